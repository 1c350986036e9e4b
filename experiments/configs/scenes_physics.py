"""A model that continues scenes with gravity, bounces and collisions, to be judged by laws of motion, within an hour.

    python tools/render_scenes.py --out runs/scenes/physics --count 5000 --levels 3 --frames 9 17 17 25 33 \
        --sides 48 48 48 80 80 48 64 64
    python experiments/train.py experiments/configs/scenes_physics.py --data runs/scenes/physics \
        --workdir runs/scenes/laws
    python experiments/evaluate.py runs/scenes/laws --protocol physics_extension --out runs/scenes/laws/physics

Any number of frames at the beginning is known, with which the caption says how a scene goes on. The scenes of the
protocol, which show one law each, are drawn by another rule than those of the training.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import scenes

from dit_video.data.windows import WindowConfig
from dit_video.experiment import DataConfig
from dit_video.models.conditioning import Beginning, FrameConditioning
from dit_video.tokens import Grid
from dit_video.training.optim.schedules import WarmupStableDecay

_MODEL = scenes.EXPERIMENT.get_model()
_DATA = DataConfig(max_pixels=48 * 80, max_frames=25)
_AUTOENCODER, *_, _DENOISER = scenes.make_stages(_DATA, one_object=())
_WINDOWS = (
    WindowConfig(size=Grid(25, 48, 48), batch=3),
    WindowConfig(size=Grid(17, 48, 48), batch=5),
    WindowConfig(size=Grid(9, 48, 48), batch=8),
)

EXPERIMENT = dataclasses.replace(
    scenes.EXPERIMENT,
    name="scenes_physics",
    data=_DATA,
    model=dataclasses.replace(
        _MODEL,
        backbone=_MODEL.backbone.replace(cond_channels=_MODEL.autoencoder.stride.t + _MODEL.autoencoder.channels),
        frame_conditioning=FrameConditioning(prob=0.9, rest="grey", masks=(Beginning(),)),
    ),
    stages=(
        dataclasses.replace(_AUTOENCODER, windows=_WINDOWS),
        dataclasses.replace(
            _DENOISER,
            continues=None,
            optimizer=dataclasses.replace(scenes.OPTIMIZER, schedule=WarmupStableDecay(warmup=50, decay=0.4)),
        ),
    ),
)
