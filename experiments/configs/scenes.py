"""A text-to-video model of rendered scenes with one or two textured objects, trained from scratch on a laptop.

    python tools/render_scenes.py --out runs/scenes/one_object --count 3000 --levels 1 --frames 17 --seed 1
    python tools/render_scenes.py --out runs/scenes/clips --levels 1 2 2 2 --frames 1 9 17 17 17 17 33
    python experiments/train.py experiments/configs/scenes.py --data runs/scenes/one_object runs/scenes/clips \
        --workdir runs/scenes/text

The captions are long, of few words, which is why the text encoder reads words. The first stage has clips of one object
alone, from which the model learns directions in a few hundred steps. Which of two objects has which direction takes it
many times as long, so most of the other clips have two. `scenes_tasks.py` is the same model with a mix of tasks.
"""

import dataclasses

from dit_video.data.windows import WindowConfig
from dit_video.diffusion import Guidance, RectifiedFlow
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import WordEncoderConfig
from dit_video.sampling import Sampling
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import Muon
from dit_video.training.optim.schedules import Constant, Cosine, WarmupStableDecay

DATA = DataConfig(max_pixels=32 * 48, max_frames=33, weights=(0.0, 1.0))
OPTIMIZER = Muon(learning_rate=3e-3, schedule=WarmupStableDecay(warmup=50), rms=0.5, b2=0.99)


def make_stages(
    data: DataConfig, *, one_object: tuple[float, ...]
) -> tuple[TrainAutoencoder, TrainDenoiser, TrainDenoiser]:
    """Return the stages: the autoencoder's, and the denoiser's on clips of one object, and on all.

    Args:
      data: Data of all but the first of the denoiser.
      one_object: Weights of the data sets in that one.
    """
    return (
        TrainAutoencoder(
            windows=(
                WindowConfig(size=Grid(33, 32, 32), batch=6),
                WindowConfig(size=Grid(17, 32, 32), batch=12),
                WindowConfig(size=Grid(9, 32, 32), batch=16),
                WindowConfig(size=Grid(1, 32, 32), batch=32),
            ),
            optimizer=Muon(learning_rate=3e-3, schedule=Cosine(warmup=30), rms=0.5),
            steps=3600,
            # No error of gradients: borders between latents would show less, but which of two objects has which
            # direction would be learned much later.
            loss=AutoencoderObjective.pixels(kl=1e-4),
        ),
        TrainDenoiser(
            name="one_object",
            data=dataclasses.replace(data, weights=one_object),
            batch=10,
            optimizer=dataclasses.replace(OPTIMIZER, schedule=Constant(warmup=50)),
            steps=450,
            ema_decay=0.995,
        ),
        TrainDenoiser(
            continues="one_object",
            batch=10,
            optimizer=dataclasses.replace(OPTIMIZER, schedule=WarmupStableDecay(decay=0.4)),
            steps=2400,
            ema_decay=0.995,
        ),
    )


EXPERIMENT = Experiment(
    name="scenes",
    data=DATA,
    model=ModelConfig(
        autoencoder=PatchVaeConfig(
            stride=Grid(4, 8, 8), channels=16, width=128, blocks=2, preactivated=True, fine_widths=(64,)
        ),
        backbone=DiTConfig(channels=16, context_width=96, patch=Grid(1, 2, 2), width=208, layers=5, heads=4),
        text_encoder=WordEncoderConfig(width=96, layers=1, max_tokens=64),
        process=RectifiedFlow(shift=4.0),
        layout=PackedShape(tokens=120, text=160, segments=8),
    ),
    stages=make_stages(DATA, one_object=(1.0, 0.0)),
    sampling=Sampling(steps=32, guidance=Guidance(scales={"text": 2.0})),
    evaluation=CaptionEvaluation(trained=8, held_out=0),
    save_every=300,
)
