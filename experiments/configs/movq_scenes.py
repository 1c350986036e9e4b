"""A small video MoVQ of rendered scenes, for half an hour on a laptop: 4×8×8 pixels to one of 4,096 codes.

    python tools/render_scenes.py --out runs/scenes/videos --count 3000 --frames 17
    python experiments/train.py experiments/configs/movq_scenes.py --data runs/scenes/videos \
        --workdir runs/movq --autoencoder-only

`movq_scenes_vae.py` is a VAE with the same network, for comparison. The log has the codebook's `usage`, and the report
the reconstruction of held-out clips.
"""

import dataclasses

from dit_video.data.windows import WindowConfig
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder
from dit_video.models.autoencoders import (
    AutoencoderObjective,
    CausalVaeConfig,
    CodebookConfig,
    CodebookLearning,
    VqConfig,
)
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import WordEncoderConfig
from dit_video.tokens import Grid
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Cosine

NETWORK = CausalVaeConfig(
    channels=8,
    width=16,
    multipliers=(1, 2, 4, 4),
    factors=(Grid(1, 2, 2), Grid(2, 2, 2), Grid(2, 2, 2)),
    blocks=1,
)
TRAINING = TrainAutoencoder(
    windows=(
        WindowConfig(size=Grid(17, 32, 32), batch=4),  # as long as the clips, as later frames would be lost
        WindowConfig(size=Grid(1, 32, 32), batch=32),
    ),
    optimizer=AdamW(learning_rate=1e-3, schedule=Cosine(warmup=100)),
    steps=3500,
    loss=dataclasses.replace(
        AutoencoderObjective.pixels(kl=0.0), codebook=CodebookLearning(decay=0.99, restart_after=100)
    ),
    ema_decay=0.995,
)
HELD_OUT = tuple(f"clips/{number:06d}.mp4" for number in range(64))

EXPERIMENT = Experiment(
    name="movq_scenes",
    data=DataConfig(max_pixels=32 * 48, max_frames=17, held_out=HELD_OUT),
    model=ModelConfig(
        autoencoder=VqConfig(
            network=NETWORK, codebook=CodebookConfig(codes=4096, width=8, spherical=True), modulated=True
        ),
        backbone=DiTConfig(channels=8, context_width=96, patch=Grid(1, 2, 2), width=96, layers=2, heads=4),
        text_encoder=WordEncoderConfig(width=96, layers=1, max_tokens=64),
    ),
    stages=(TRAINING,),
    save_every=1000,
)
