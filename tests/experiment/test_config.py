import json
import pathlib
from dataclasses import replace

import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.data.windows import WindowConfig
from dit_video.distributed import Parallelism
from dit_video.experiment import Experiment
from dit_video.experiment.config_file import load_experiment
from dit_video.models.autoencoders import AdversarialConfig, AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.conditioning import FrameConditioning, LowResolutionClip
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.sampling import Sampling
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[2] / "experiments" / "configs").glob("*.py"))
CONFIGS = [path for path in CONFIGS if path.stem != "wan"]  # what the configs of Wan's shapes share


def change_field(value, path, new):
    """Change one field of a nested dataclass, as in `change_field(experiment, "denoiser.optimizer.b1", 0.5)`."""
    name, _, rest = path.partition(".")
    changed = change_field(getattr(value, name), rest, new) if rest else new
    if name in ("autoencoder", "denoiser") and isinstance(value, Experiment):
        return replace(value, stages=tuple(changed if stage.name == name else stage for stage in value.stages))
    return replace(value, **{name: changed})


def test_the_limits_of_data_are_multiples_of_whole_patches(tiny):
    limits = tiny.EXPERIMENT.limits
    assert limits.multiple == Grid(4, 16, 16)
    assert (limits.max_pixels, limits.max_frames, limits.fps) == (16 * 32, 9, None)


DISAGREEMENTS = [
    # T is not 1 + 4k
    ("data.max_frames", 8, "max_frames does not fit the autoencoder: T=8 is not 1 + 4k"),
    ("autoencoder.windows", (WindowConfig(size=Grid(4, 16, 16), batch=4),), "use 1 or 5"),
    ("autoencoder.windows", (WindowConfig(size=Grid(5, 12, 16), batch=4),), "height 12 is not divisible"),
    ("autoencoder.windows", (WindowConfig(size=Grid(5, 16, 20), batch=4),), "width 20 is not divisible"),
    ("autoencoder.windows", (), "autoencoder.windows is empty"),
    ("autoencoder.windows", (WindowConfig(size=Grid(13, 16, 16), batch=4),), "larger than any clip"),
    ("autoencoder.windows", (WindowConfig(size=Grid(9, 32, 32), batch=4),), "larger than any clip"),
    ("model.autoencoder", PatchVaeConfig(stride=Grid(3, 8, 8), channels=4), "T=9 is not 1 + 3k"),
    # output of one part that the other refuses
    ("model.backbone.channels", 5, "Use backbone.channels=4."),
    ("model.backbone.conditioning", (LowResolutionClip(), LowResolutionClip()), "another conditioning has this name"),
    ("model.backbone.context_width", 8, "Use backbone.context_width=16."),
    (
        "model.autoencoder",
        PatchVaeConfig(stride=Grid(4, 1, 1), channels=16),
        "channels=16 is invalid: a patch of (4, 1, 1) pixels has only 12 values",
    ),
    # rows
    ("model.layout", PackedShape(tokens=5, text=96, segments=3), "Use layout.tokens=6,"),
    ("model.layout", PackedShape(tokens=12, text=28, segments=3), "Use text_encoder.max_tokens=28 or less"),
    (
        "model.layout",
        PackedShape(tokens=12, text=97, segments=3),
        "layout.text=97 is invalid: it is not divisible by the text encoder's patch",
    ),
    ("model.layout", PackedShape(tokens=12, text=96, segments=0), "layout.segments=0 is invalid"),
    ("model.backbone.patch", Grid(2, 2, 2), "backbone.patch.t=2 is invalid"),
    ("model.backbone.patch", Grid(1, 0, 2), "patch=0 is invalid"),
    ("data.max_pixels", 15 * 16, "less than one multiple of 16x16"),
    ("data.max_pixels", 64 * 64, "lower data.max_pixels"),
    ("model.fps", 0.0, "fps=0.0 is invalid: it must be positive"),
    ("data.clips_per_video", 0, "data.clips_per_video=0 is invalid"),
    # trainings
    ("autoencoder.steps", 2, "warmup=2 is invalid: it must be below steps=2"),
    ("denoiser.steps", 1, "warmup=2 is invalid: it must be below steps=1"),
    ("denoiser.steps", 0, "denoiser.steps=0 is invalid"),
    ("denoiser.batch", 0, "denoiser.batch=0 is invalid"),
    ("denoiser.accumulation_steps", 0, "denoiser.accumulation_steps=0 is invalid"),
    ("denoiser.accumulation_steps", 3, "batch=2 is not divisible by accumulation_steps=3"),
    ("denoiser.caption_dropout", 1.5, "caption_dropout=1.5 is invalid: it must lie in [0, 1]"),
    ("denoiser.caption_dropout", float("nan"), "caption_dropout=nan is invalid"),
    ("denoiser.ema_decay", 1.0, "ema_decay=1.0 is invalid: it must lie in [0, 1)"),
    (
        "autoencoder.loss.adversarial",
        AdversarialConfig(start_step=8),
        "adversarial.start_step=8 is invalid: the autoencoder is trained for only 8 steps",
    ),
    ("autoencoder.loss.adversarial", AdversarialConfig(layers=5), "windows of 32 pixels or more, but one has 16"),
    ("denoiser.time_per", "frame", "a denoiser with time='token'"),
    ("model.backbone.variance", "predicted", "variance='predicted' of the backbone and prediction=LearnedVariance"),
    ("model.image_encoder", "clip", "attends to no image tokens; leave out image_encoder"),
    ("model.frame_conditioning", FrameConditioning(), "needs cond_channels or time="),
    ("log_every", 0, "log_every=0 is invalid"),
    ("max_consecutive_skips", 0, "max_consecutive_skips=0 is invalid"),
    ("save_every", -5, "save_every=-5 is invalid"),
    ("seed", -1, "seed=-1 is invalid"),
    ("seed", 2**32, "seed=4294967296 is invalid: it must be a whole number from 0 to 4294967295"),
]


@pytest.mark.parametrize(("path", "value", "message"), DISAGREEMENTS)
def test_parts_that_disagree_are_refused(tiny, path, value, message):
    with pytest.raises(UserError) as error:
        change_field(tiny.EXPERIMENT, path, value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_windows_that_lpips_cannot_see_are_refused(tiny):
    judged = AutoencoderObjective(lpips=0.5, lpips_weights="lpips.safetensors")
    experiment = change_field(tiny.EXPERIMENT, "autoencoder.loss", judged)
    with pytest.raises(UserError, match="LPIPS needs windows of 16 pixels or more, not 8"):
        change_field(experiment, "autoencoder.windows", (WindowConfig(size=Grid(5, 8, 16), batch=4),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DiTConfig(channels=4, context_width=8, width=30, heads=4),
            "width 30 must be divisible by its 4 heads",
        ),
        (lambda: DiTConfig(channels=4, context_width=8, width=12, heads=4), "must be even"),
        (lambda: ByteEncoderConfig(width=18, heads=4), "width=18, heads=4 .*heads that divide"),
        (lambda: ByteEncoderConfig(max_tokens=30), "patch=4 .*multiple of the patch"),
        (lambda: PatchVaeConfig(width=0), "width=0.*at least 1"),
        (lambda: WindowConfig(size=Grid(0, 16, 16), batch=1), "at least 1"),
        (lambda: WindowConfig(size=Grid(1, 16, 16), batch=0), "at least 1"),
        (lambda: AdamW(learning_rate=0.0), "learning_rate=0.0"),
        (lambda: AdamW(schedule=Constant(warmup=-1)), "warmup=-1"),
        (lambda: Sampling(steps=0), "steps=0 is invalid: it must be at least 1"),
        (lambda: Parallelism(data=-1, fsdp=-1), "only one axis"),
    ],
)
def test_a_part_that_is_wrong_by_itself_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_an_experiment_comes_back_from_json(tiny):
    written = json.dumps(config_json.to_json(tiny.EXPERIMENT))
    assert config_json.from_json(json.loads(written)) == tiny.EXPERIMENT


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_defines_an_experiment_that_comes_back_from_json(path):
    experiment = load_experiment(path)
    assert isinstance(experiment, Experiment)
    assert config_json.from_json(json.loads(json.dumps(config_json.to_json(experiment)))) == experiment


def test_the_folder_of_configs_is_not_empty():
    assert {"quickstart", "clips"} <= {path.stem for path in CONFIGS}


def test_the_quickstart_holds_out_clips_that_it_renders(load_file):
    from dit_video.scenes import shapes

    quickstart = load_file(next(path for path in CONFIGS if path.stem == "quickstart"))
    for brief in (False, True):
        experiment, count = quickstart.make_experiment(3, brief=brief), quickstart.count_clips(brief=brief)
        last = [shapes.get_file_name(index, seed=3) for index in range(count - quickstart.NUM_HELD_OUT, count)]
        assert list(experiment.data.held_out) == last
        assert len(set(last)) == quickstart.NUM_HELD_OUT
    assert quickstart.make_experiment(3).seed == 3
