"""A model of rendered scenes that makes clips from text and completes clips: every task of the framework.

    python tools/render_scenes.py --out runs/scenes/one_object --count 3000 --levels 1 --frames 17 --seed 1
    python tools/render_scenes.py --out runs/scenes/clips --levels 1 2 2 2 --frames 1 9 17 17 17 17 33
    python tools/render_scenes.py --out runs/scenes/loops --count 3000 --kind loops --frames 17 17 33 --seed 2
    python experiments/train.py experiments/configs/scenes_tasks.py \
        --data runs/scenes/one_object runs/scenes/clips runs/scenes/loops --workdir runs/scenes/tasks

Half of the examples are text to video, as in `scenes.py`. In the others parts are known: frames at the beginning, at
the end or between, or regions. The model reads their mask and their latents beside the noisy ones, of clips in which
all unknown pixels are grey. Some clips are loops, as their captions say. The first two stages of the denoiser are text
to video alone, of one object and of one or two: the other tasks are learned sooner than which object has which
direction.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import scenes

from dit_video.diffusion import Uniform
from dit_video.experiment import DataConfig, Stage
from dit_video.models.conditioning import (
    Beginning,
    BothEnds,
    Ending,
    FirstAndLastFrame,
    FirstFrame,
    FrameConditioning,
    InsideOfBox,
    Keyframes,
    LastFrame,
    OutsideOfBox,
)

DATA = dataclasses.replace(scenes.DATA, weights=(0.0, 0.8, 0.2))


def make_stages(data: DataConfig, *, one_object: tuple[float, ...]) -> tuple[Stage, ...]:
    """Return the stages: the autoencoder's, and the denoiser's on text, of one object and of all, and on all tasks.

    Args:
      data: Data of all but the first of the denoiser.
      one_object: Weights of the data sets in that one.
    """
    autoencoder, first, last = scenes.make_stages(data, one_object=one_object)
    first = dataclasses.replace(first, frame_conditioning=FrameConditioning(prob=0.0))
    second = dataclasses.replace(first, name="text", continues=first.name, data=None, steps=1000)
    # Logit-normal times with this shift are hardly ever those at which textures are seen.
    return autoencoder, first, second, dataclasses.replace(last, continues=second.name, steps=1500, times=Uniform())


_MODEL = scenes.EXPERIMENT.get_model()
_MASKS = (
    FirstFrame(weight=2.0),
    LastFrame(),
    FirstAndLastFrame(),
    Beginning(),
    Ending(),
    BothEnds(weight=2.0),
    Keyframes(weight=2.0),
    OutsideOfBox(weight=2.0),
    InsideOfBox(weight=2.0),
)

EXPERIMENT = dataclasses.replace(
    scenes.EXPERIMENT,
    name="scenes_tasks",
    data=DATA,
    model=dataclasses.replace(
        _MODEL,
        backbone=_MODEL.backbone.replace(cond_channels=_MODEL.autoencoder.stride.t + _MODEL.autoencoder.channels),
        frame_conditioning=FrameConditioning(prob=0.5, rest="grey", masks=_MASKS),
    ),
    stages=make_stages(DATA, one_object=(1.0, 0.0, 0.0)),
)
