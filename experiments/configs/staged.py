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
from dit_video.diffusion import FlowMatching, Guidance, LogitNormal, RectifiedFlow
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import AutoencoderTraining, CurriculumStage, DataConfig, DenoiserTraining, Experiment
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DitConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.sampling import Sampling
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import OptimizerConfig


def make_optimizer(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(kind="muon", learning_rate=learning_rate, warmup=20)


def make_objective(shift: float) -> FlowMatching:
    return FlowMatching(process=RectifiedFlow(shift=shift), times=LogitNormal())


EXPERIMENT = Experiment(
    name="staged",
    autoencoder=AutoencoderTraining(
        model=PatchVaeConfig(stride=Grid(4, 8, 8), channels=16, width=128, blocks=4),
        windows=(WindowConfig(size=Grid(9, 48, 80), batch=8), WindowConfig(size=Grid(9, 80, 48), batch=8)),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup=30),
        steps=600,
        loss=AutoencoderObjective.pixels(kl=1e-6),
    ),
    curriculum=(
        CurriculumStage(
            name="images",
            steps=100,
            data=DataConfig(max_pixels=48 * 64, max_frames=1, fps=8.0, clips_per_video=8),
            layout=PackedShape(tokens=96, text=1024, segments=8),
            optimizer=make_optimizer(2e-3),
            objective=make_objective(1.0),
        ),
        CurriculumStage(
            name="small",
            steps=100,
            data=DataConfig(max_pixels=48 * 64, max_frames=17, fps=8.0, clips_per_video=4),
            layout=PackedShape(tokens=240, text=512, segments=8),
            optimizer=make_optimizer(2e-3),
            objective=make_objective(1.5),
        ),
        CurriculumStage(
            name="large",
            steps=250,
            data=DataConfig(max_pixels=96 * 128, max_frames=17, fps=8.0, clips_per_video=4),
            layout=PackedShape(tokens=480, text=512, segments=8),
            optimizer=make_optimizer(2e-3),
            objective=make_objective(2.0),
        ),
    ),
    data=DataConfig(max_pixels=96 * 128, max_frames=33, fps=8.0, clips_per_video=4),
    denoiser=DenoiserTraining(
        backbone=DitConfig(channels=16, context_width=96, patch=Grid(1, 2, 2), width=192, layers=6, heads=4),
        text=ByteEncoderConfig(width=96, layers=2, max_tokens=256),
        layout=PackedShape(tokens=864, text=512, segments=8),
        batch=2,
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-3, schedule="wsd", warmup=20),
        steps=120,
        objective=make_objective(3.0),
        ema_decay=0.98,
    ),
    sampling=Sampling(steps=32, guidance=Guidance(scale=1.5)),
    evaluation=CaptionEvaluation(trained=6, held_out=4),
    save_every=50,
)
