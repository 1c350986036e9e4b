"""The quickstart with a U-Net on canvases, instead of a diffusion transformer on packed rows.

python experiments/quickstart.py --config unet
"""

import dataclasses

from configs import quickstart
from dit_video.data.windows import WindowConfig
from dit_video.experiment import Experiment, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.unet import UnetConfig
from dit_video.tokens import CanvasShape, Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Cosine, WarmupStableDecay

CHANNELS = 4


def make_experiment(seed: int = 0, *, brief: bool = False) -> Experiment:
    """Return the experiment with a seed; `brief` makes it a smoke test of one minute that learns too little."""
    transformer = make_transformer_experiment(seed, brief=brief)
    unet = UnetConfig(channels=CHANNELS, context_width=64, width=32, multipliers=(1, 2), heads=4)
    size = Grid(5, 28, 28)
    canvas = CanvasShape(size=size, text=320, segments=18, cell=unet.size_multiple, padding=unet.canvas_padding)
    return transformer.replace_model(backbone=unet, layout=canvas)


def make_transformer_experiment(seed: int = 0, *, brief: bool = False) -> Experiment:
    """Return the same experiment with a transformer: it differs in `backbone` and `layout` alone."""
    base = quickstart.make_experiment(seed, brief=brief)
    model = dataclasses.replace(
        base.get_model(),
        autoencoder=PatchVaeConfig(stride=Grid(4, 4, 4), channels=CHANNELS, width=40, blocks=2),
        backbone=DiTConfig(channels=CHANNELS, context_width=64, patch=Grid(1, 4, 4), width=176, layers=4, heads=4),
        layout=PackedShape(tokens=120, text=320, segments=18),
    )
    stages = (
        TrainAutoencoder(
            windows=(
                WindowConfig(size=Grid(17, 32, 32), batch=8),
                WindowConfig(size=Grid(9, 32, 32), batch=8),
                WindowConfig(size=Grid(1, 32, 32), batch=16),
            ),
            optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup=30)),
            steps=60 if brief else 900,
            loss=AutoencoderObjective.pixels(kl=1e-4),
        ),
        TrainDenoiser(
            batch=4,
            optimizer=AdamW(learning_rate=2e-3, schedule=WarmupStableDecay(warmup=50), b2=0.99),
            steps=60 if brief else 2800,
            ema_decay=0.995,
        ),
    )
    return dataclasses.replace(base, name="shapes-unet", model=model, stages=stages)


EXPERIMENT = make_experiment()
