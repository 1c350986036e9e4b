import json
import pathlib
from dataclasses import replace

import pytest

from dit_video.autoencoders import Adversarial, AutoencoderObjective, PatchVaeConfig
from dit_video.backbones.dit import DitConfig
from dit_video.conditioning import KnownFrames
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.windows import WindowConfig
from dit_video.distributed import MeshConfig
from dit_video.experiment import Experiment
from dit_video.generation import Sampling
from dit_video.text import ByteEncoderConfig
from dit_video.tokens import Grid, RowShape
from dit_video.training.optim.optimizer import OptimizerConfig

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs").glob("*.py"))


def changed(value, path, new):
    """A nested dataclass with one field changed: `changed(experiment, "denoiser.dit.channels", 3)`."""
    name, _, rest = path.partition(".")
    return replace(value, **{name: changed(getattr(value, name), rest, new) if rest else new})


def test_limits_are_whole_patches(tiny):
    limits = tiny.EXPERIMENT.limits
    assert limits.multiple == Grid(4, 16, 16)
    assert (limits.max_pixels, limits.max_frames, limits.fps) == (16 * 32, 9, None)


DISAGREEMENTS = [
    # T is not 1 + 4k
    ("data.max_frames", 8, "max_frames does not fit the autoencoder: T=8 is not 1 + 4k"),
    ("autoencoder.windows", (WindowConfig(size=Grid(4, 16, 16), batch=4),), "use 1 or 5"),
    ("autoencoder.windows", (WindowConfig(size=Grid(5, 12, 16), batch=4),), "height 12 is not divisible"),
    ("autoencoder.windows", (WindowConfig(size=Grid(5, 16, 20), batch=4),), "width 20 is not divisible"),
    ("autoencoder.windows", (), "at least one window"),
    ("autoencoder.windows", (WindowConfig(size=Grid(13, 16, 16), batch=4),), "larger than any clip"),
    ("autoencoder.windows", (WindowConfig(size=Grid(9, 32, 32), batch=4),), "larger than any clip"),
    ("autoencoder.model", PatchVaeConfig(stride=Grid(3, 8, 8), channels=4), "T=9 is not 1 + 3k"),
    # one part makes what the other doesn't take
    ("denoiser.dit.channels", 5, "takes 5 channels, the autoencoder makes 4; set dit channels=4"),
    ("denoiser.dit.context_width", 8, "width 8, the text encoder makes 16; set dit context_width=16"),
    ("autoencoder.model", PatchVaeConfig(stride=Grid(4, 1, 1), channels=16), "16 channels are more than the 12 values"),
    # rows
    ("denoiser.rows", RowShape(tokens=5, text=96, segments=3), "up to 6 tokens, a row has room for 5"),
    ("denoiser.rows", RowShape(tokens=12, text=28, segments=3), "a caption may have 32 tokens, a row has room for 28"),
    ("denoiser.rows", RowShape(tokens=12, text=97, segments=3), "not divisible by the text encoder's patch"),
    ("denoiser.rows", RowShape(tokens=12, text=96, segments=0), "rows segments must be at least 1, not 0"),
    ("denoiser.dit.patch", Grid(2, 2, 2), "divides no clip"),
    ("denoiser.dit.patch", Grid(1, 0, 2), "patch must be at least 1"),
    ("data.max_pixels", 15 * 16, "less than one multiple of 16x16"),
    ("data.max_pixels", 64 * 64, "lower max_pixels"),
    ("data.fps", 0.0, "fps=0.0 must be positive"),
    ("data.stretches", 0, "stretches must be at least 1"),
    # trainings
    ("autoencoder.steps", 2, "a run of 2 steps is not longer than its warmup of 2"),
    ("denoiser.steps", 1, "a run of 1 steps is not longer than its warmup of 2"),
    ("denoiser.steps", 0, "denoiser steps must be at least 1"),
    ("denoiser.batch", 0, "denoiser batch must be at least 1"),
    ("denoiser.accumulate", 0, "accumulate must be at least 1"),
    ("denoiser.accumulate", 3, "a batch of 2 rows is not divisible into accumulate=3 parts"),
    ("denoiser.caption_dropout", 1.5, "caption_dropout 1.5 must lie in [0, 1]"),
    ("denoiser.caption_dropout", float("nan"), "must lie in [0, 1]"),
    ("denoiser.ema_decay", 1.0, "ema_decay 1.0 must lie in [0, 1)"),
    ("autoencoder.loss.adversarial", Adversarial(start=8), "starts at step 8, the autoencoder is trained for 8"),
    ("autoencoder.loss.adversarial", Adversarial(layers=5), "windows of 32 pixels or more, one has 16"),
    ("denoiser.times_of", "frame", "a denoiser with time='token'"),
    ("denoiser.dit.variance", "predicted", "goes with an objective that predicts a LearnedVariance"),
    ("denoiser.image_encoder", "clip", "attends to no image's tokens; leave out image_encoder"),
    ("denoiser.known", KnownFrames(), "can't be told which frames are known"),
    ("log_every", 0, "log_every must be at least 1"),
    ("most_skipped", 0, "most_skipped must be at least 1"),
    ("save_every", -5, "save_every must be at least 1"),
    ("seed", -1, "not -1"),
    ("seed", 2**32, "a seed is a whole number from 0 to 4294967295"),
]


@pytest.mark.parametrize(("path", "value", "message"), DISAGREEMENTS)
def test_parts_that_disagree_are_refused(tiny, path, value, message):
    with pytest.raises(UserError) as error:
        changed(tiny.EXPERIMENT, path, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_windows_that_lpips_cannot_see_are_refused(tiny):
    judged = AutoencoderObjective(lpips=0.5, lpips_weights="lpips.safetensors")
    experiment = changed(tiny.EXPERIMENT, "autoencoder.loss", judged)
    with pytest.raises(UserError, match="LPIPS needs windows of 16 pixels or more, one has 8"):
        changed(experiment, "autoencoder.windows", (WindowConfig(size=Grid(5, 8, 16), batch=4),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DitConfig(channels=4, context_width=8, width=30, heads=4),
            "width 30 must be divisible by its 4 heads",
        ),
        (lambda: DitConfig(channels=4, context_width=8, width=12, heads=4), "even numbers"),
        (lambda: ByteEncoderConfig(width=18, heads=4), "divisible by its 4 heads"),
        (lambda: ByteEncoderConfig(max_tokens=30), "divisible by the patch of 4 bytes"),
        (lambda: PatchVaeConfig(width=0), "must be at least 1"),
        (lambda: WindowConfig(size=Grid(0, 16, 16), batch=1), "at least 1"),
        (lambda: WindowConfig(size=Grid(1, 16, 16), batch=0), "at least 1"),
        (lambda: OptimizerConfig(learning_rate=0.0), "positive learning rate"),
        (lambda: OptimizerConfig(warmup=-1), "no negative warmup"),
        (lambda: Sampling(steps=0), "at least 1 step"),
        (lambda: MeshConfig(data=-1, fsdp=-1), "only one mesh axis"),
    ],
)
def test_a_part_that_is_wrong_by_itself_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_it_comes_back_from_json(tiny):
    written = json.dumps(config_json.to_json(tiny.EXPERIMENT))
    assert config_json.from_json(json.loads(written)) == tiny.EXPERIMENT


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_defines_an_experiment_that_comes_back_from_json(load_file, path):
    experiment = load_file(path).EXPERIMENT
    assert isinstance(experiment, Experiment)
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(experiment)))) == experiment


def test_there_are_config_files():
    assert {"quickstart", "clips"} <= {path.stem for path in CONFIGS}


def test_the_quickstart_holds_out_clips_that_it_renders(load_file):
    from dit_video.data.synthetic import shapes

    quickstart = load_file(next(path for path in CONFIGS if path.stem == "quickstart"))
    for brief in (False, True):
        experiment, count = quickstart.experiment(3, brief=brief), quickstart.clips(brief=brief)
        last = [shapes.file_name(index, seed=3) for index in range(count - quickstart.HELD_OUT, count)]
        assert list(experiment.data.held_out) == last
        assert len(set(last)) == quickstart.HELD_OUT
    assert quickstart.experiment(3).seed == 3
