"""A model of scenes with gravity, bounces and collisions, to be judged by the laws of motion, in half an hour.

    python tools/render_scenes.py --out runs/scenes/one_object --count 3000 --levels 1 --frames 17 --seed 1
    python tools/render_scenes.py --out runs/scenes/physics --count 5000 --levels 3 --frames 9 17 17 25 33 \
        --sides 48 48 48 80 80 48 64 64
    python experiments/train.py experiments/configs/scenes_physics.py \
        --data runs/scenes/one_object runs/scenes/physics --workdir runs/scenes/laws
    python experiments/evaluate.py runs/scenes/laws --protocol physics physics_extension --out runs/scenes/laws/physics

The model is that of `scenes_tasks.py`, for larger and longer clips. The scenes of the two protocols, which show one law
each, are drawn by another rule than those of the training.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import scenes_tasks

from dit_video.experiment import DataConfig
from dit_video.tokens import PackedShape

_MODEL = scenes_tasks.EXPERIMENT.get_model()
_DATA = DataConfig(max_pixels=64 * 96, max_frames=33, weights=(0.0, 1.0))

EXPERIMENT = dataclasses.replace(
    scenes_tasks.EXPERIMENT,
    name="scenes_physics",
    data=_DATA,
    model=dataclasses.replace(_MODEL, layout=PackedShape(tokens=216, text=320, segments=8)),
    stages=scenes_tasks.make_stages(_DATA, one_object=(1.0, 0.0)),
)
