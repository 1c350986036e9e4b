"""The model of `scenes_tasks.py` as one that makes clips four times larger, trained for some more minutes.

    python experiments/train.py experiments/configs/scenes_super_resolution.py --data runs/scenes/clips \
        --workdir runs/scenes/large
    python experiments/evaluate.py runs/scenes/large --protocol scenes_super_resolution --out runs/scenes/large/enlarged

It begins with the weights and the autoencoder of runs/scenes/tasks. A clip of low resolution has 2×2 pixels of each
frame for a latent of 4×8×8 pixels.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import scenes
import scenes_tasks

from dit_video.experiment import AllWeights, TrainDenoiser
from dit_video.models.conditioning import FrameConditioning, LowResolutionClip
from dit_video.sampling import Sampling
from dit_video.tokens import Grid

BASE = "runs/scenes/tasks"
_MODEL = scenes_tasks.EXPERIMENT.get_model()

EXPERIMENT = dataclasses.replace(
    scenes_tasks.EXPERIMENT,
    name="scenes_super_resolution",
    data=dataclasses.replace(scenes.DATA, weights=()),
    autoencoder_from=BASE,
    model=dataclasses.replace(
        _MODEL, backbone=_MODEL.backbone.replace(conditioning=(LowResolutionClip(pixels=Grid(4, 2, 2)),))
    ),
    # The clip says what the caption says, and few steps keep nearer to it.
    sampling=Sampling(steps=4),
    stages=(
        TrainDenoiser(
            train=AllWeights(init_from=BASE),
            frame_conditioning=FrameConditioning(prob=0.0),
            batch=10,
            optimizer=scenes.OPTIMIZER,
            steps=1000,
            ema_decay=0.99,
        ),
    ),
)
