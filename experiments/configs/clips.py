"""A folder of real clips at their own aspect ratios, trained for a few minutes on a laptop's CPU.

    python experiments/train.py experiments/configs/clips.py --data CLIPS --workdir runs/clips --data.held-out NAME NAME

CLIPS holds videos and a `metadata.csv` (`file_name,text`). The clips named by `--data.held-out` are not trained on, but
reconstructed and reported. Frames have up to 96×128 pixels at 8 fps, clips up to 17 frames, and one latent of 16
channels stands for 4×8×8 pixels. The model is far too small, and trained far too briefly, for real scenes: this config
shows that every step works on real input, and is a starting point for others.
"""

from dit_video.diffusion import Guidance, RectifiedFlow
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.sampling import Sampling
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW, Muon
from dit_video.training.optim.schedules import Cosine, WarmupStableDecay

EXPERIMENT = Experiment(
    name="clips",
    data=DataConfig(max_pixels=96 * 128, max_frames=17, clips_per_video=4),
    model=ModelConfig(
        autoencoder=PatchVaeConfig(stride=Grid(4, 8, 8), channels=16, width=128, blocks=4),
        backbone=DiTConfig(channels=16, context_width=96, patch=Grid(1, 2, 2), width=192, layers=6, heads=4),
        text_encoder=ByteEncoderConfig(width=96, layers=2, max_tokens=256),
        process=RectifiedFlow(shift=2.0),
        layout=PackedShape(tokens=480, text=512, segments=8),
        fps=8.0,
    ),
    stages=(
        TrainAutoencoder(
            optimizer=AdamW(learning_rate=1e-3, schedule=Cosine(warmup=30)),
            steps=600,
            loss=AutoencoderObjective.pixels(kl=1e-6),
        ),
        TrainDenoiser(
            batch=4,
            optimizer=Muon(learning_rate=2e-3, schedule=WarmupStableDecay(warmup=50)),
            steps=400,
            ema_decay=0.99,
        ),
    ),
    sampling=Sampling(steps=32, guidance=Guidance(scales={"text": 1.5})),
    evaluation=CaptionEvaluation(trained=6, held_out=4),
    save_every=100,
)
