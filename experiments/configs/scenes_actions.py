"""A small world: an object that actions steer, in a causal model that is sampled frame by frame.

    python tools/render_scenes.py --out runs/scenes/steered --count 4000 --kind steered --frames 17 --seed 3 \
        --actions runs/scenes/actions
    python experiments/train.py experiments/configs/scenes_actions.py --data runs/scenes/steered \
        --workdir runs/scenes/world
    python experiments/evaluate.py runs/scenes/world --protocol scenes_actions --out runs/scenes/world/steered

The autoencoder is that of runs/scenes/tasks. Every frame has a diffusion time of its own in training (diffusion
forcing), so that a frame is sampled from finished ones, by `Rollout` or with an image as the first.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import scenes

from dit_video.experiment import TrainDenoiser
from dit_video.models.conditioning import FrameActions, FrameConditioning
from dit_video.nn.attention import CausalFrames

_MODEL = scenes.EXPERIMENT.get_model()

EXPERIMENT = dataclasses.replace(
    scenes.EXPERIMENT,
    name="scenes_actions",
    data=dataclasses.replace(scenes.DATA, weights=()),
    autoencoder_from="runs/scenes/tasks",
    model=dataclasses.replace(
        _MODEL,
        backbone=_MODEL.backbone.replace(
            pattern=CausalFrames(),
            absolute_position=None,
            time="token",
            conditioning=(FrameActions(folder="runs/scenes/actions", per_latent=4),),
        ),
        frame_conditioning=FrameConditioning(prob=0.5),
    ),
    stages=(TrainDenoiser(batch=10, optimizer=scenes.OPTIMIZER, steps=2000, ema_decay=0.995, time_per="frame"),),
)
