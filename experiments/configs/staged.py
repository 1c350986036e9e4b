"""A training in four stages on a folder of clips: images, small clips, large clips, then long clips.

    python experiments/train.py experiments/configs/staged.py --data CLIPS --workdir runs/staged

This is the recipe of the open video models on a small scale, for the same folders as `clips.py`. Each stage has its own
frame size, rows, learning rate and time shift; weights, optimizer state and averages are carried over. After an
interruption, run the same command again to continue a stage. Times are shifted further towards noise for larger and
longer clips, because more tokens reveal more of a clip at the same noise level.

On 17 clips and two cores shared with other jobs, the autoencoder took five minutes and the four stages 19; the loss
ends at 0.20, and samples of the training clips, which the model has memorized, are recognizable.
"""

from dit_video.data.windows import WindowConfig
from dit_video.diffusion import Guidance, RectifiedFlow
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.sampling import Sampling
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW, Muon, OptimizerConfig
from dit_video.training.optim.schedules import Constant, Cosine, WarmupStableDecay


def make_optimizer(learning_rate: float) -> OptimizerConfig:
    return Muon(learning_rate=learning_rate, schedule=Constant(warmup=20))


EXPERIMENT = Experiment(
    name="staged",
    data=DataConfig(max_pixels=96 * 128, max_frames=33, clips_per_video=4),
    model=ModelConfig(
        autoencoder=PatchVaeConfig(stride=Grid(4, 8, 8), channels=16, width=128, blocks=4),
        backbone=DiTConfig(channels=16, context_width=96, patch=Grid(1, 2, 2), width=192, layers=6, heads=4),
        text_encoder=ByteEncoderConfig(width=96, layers=2, max_tokens=256),
        process=RectifiedFlow(shift=3.0),
        layout=PackedShape(tokens=864, text=512, segments=8),
        fps=8.0,
    ),
    stages=(
        TrainAutoencoder(
            windows=(WindowConfig(size=Grid(9, 48, 80), batch=8), WindowConfig(size=Grid(9, 80, 48), batch=8)),
            optimizer=AdamW(learning_rate=1e-3, schedule=Cosine(warmup=30)),
            steps=600,
            loss=AutoencoderObjective.pixels(kl=1e-6),
        ),
        TrainDenoiser(
            name="images",
            data=DataConfig(max_pixels=48 * 64, max_frames=1, clips_per_video=8),
            layout=PackedShape(tokens=96, text=1024, segments=8),
            process=RectifiedFlow(shift=1.0),
            batch=2,
            optimizer=make_optimizer(2e-3),
            steps=100,
            ema_decay=0.98,
        ),
        TrainDenoiser(
            name="small",
            continues="images",
            data=DataConfig(max_pixels=48 * 64, max_frames=17, clips_per_video=4),
            layout=PackedShape(tokens=240, text=512, segments=8),
            process=RectifiedFlow(shift=1.5),
            batch=2,
            optimizer=make_optimizer(2e-3),
            steps=100,
            ema_decay=0.98,
        ),
        TrainDenoiser(
            name="large",
            continues="small",
            data=DataConfig(max_pixels=96 * 128, max_frames=17, clips_per_video=4),
            layout=PackedShape(tokens=480, text=512, segments=8),
            process=RectifiedFlow(shift=2.0),
            batch=2,
            optimizer=make_optimizer(2e-3),
            steps=250,
            ema_decay=0.98,
        ),
        TrainDenoiser(
            continues="large",
            batch=2,
            optimizer=Muon(learning_rate=1e-3, schedule=WarmupStableDecay(warmup=20)),
            steps=120,
            ema_decay=0.98,
        ),
    ),
    sampling=Sampling(steps=32, guidance=Guidance(scales={"text": 1.5})),
    evaluation=CaptionEvaluation(trained=6, held_out=4),
    save_every=50,
)
