"""The model of `scenes_tasks.py` with a control stack that follows depth, which alone is trained, for some minutes.

    python tools/render_scenes.py --out runs/scenes/clips --levels 1 2 2 2 --frames 1 9 17 17 17 17 33 \
        --depth runs/scenes/depth
    python experiments/train.py experiments/configs/scenes_depth.py --data runs/scenes/clips \
        --workdir runs/scenes/control
    python experiments/evaluate.py runs/scenes/control --protocol scenes_depth --out runs/scenes/control/followed

It begins with the weights and the autoencoder of runs/scenes/tasks. The first command completes a folder that exists.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import scenes
import scenes_tasks

from dit_video.experiment import AllWeights, TrainDenoiser
from dit_video.models.backbones.controlled_dit import ControlledDiTConfig
from dit_video.models.conditioning import ControlClip, FrameConditioning
from dit_video.tokens import Grid

BASE = "runs/scenes/tasks"
_MODEL = scenes_tasks.EXPERIMENT.get_model()
_CONTROL = ControlClip(folder="runs/scenes/depth", pixels=Grid(2, 4, 4))

EXPERIMENT = dataclasses.replace(
    scenes_tasks.EXPERIMENT,
    name="scenes_depth",
    data=dataclasses.replace(scenes.DATA, weights=()),
    autoencoder_from=BASE,
    model=dataclasses.replace(
        _MODEL,
        backbone=ControlledDiTConfig(**vars(_MODEL.backbone) | {"conditioning": (_CONTROL,), "control_layers": 3}),
    ),
    stages=(
        TrainDenoiser(
            train=AllWeights(init_from=BASE),
            frame_conditioning=FrameConditioning(prob=0.0),
            batch=10,
            optimizer=dataclasses.replace(scenes.OPTIMIZER, trainable=("control",)),
            steps=600,
            ema_decay=0.99,
        ),
    ),
)
