import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.diffusion import (
    ClipSize,
    ExponentialShift,
    FlowMatching,
    LinearShift,
    RectifiedFlow,
    Uniform,
    make_uniform_times,
)

LINEAR, EXPONENTIAL = RectifiedFlow(size_shift=LinearShift()), RectifiedFlow(size_shift=ExponentialShift())


def test_shifts_by_size_are_those_of_the_papers():
    # Open-Sora: 1 for images of 256 tokens, 3 for those of 4,096, times the root of the number of frames.
    sizes = [ClipSize(1, 256), ClipSize(1, 4096), ClipSize(16, 4096), ClipSize(9, 2176)]
    np.testing.assert_allclose([LINEAR.specialize(size).shift for size in sizes], [1, 3, 12, 6])
    # LTX-Video: e^.95 for 1,024 tokens, e^2.05 for 4,096.
    sizes = [ClipSize(4, 256), ClipSize(1, 4096), ClipSize(10, 256)]
    np.testing.assert_allclose([EXPONENTIAL.specialize(size).shift for size in sizes], np.exp([0.95, 2.05, 1.5]))


def test_a_linear_shift_may_count_the_tokens_of_the_clip():
    process = RectifiedFlow(size_shift=LinearShift(per="clip"))
    sizes = [ClipSize(1, 256), ClipSize(16, 256), ClipSize(2, 1088)]
    np.testing.assert_allclose([process.specialize(size).shift for size in sizes], [1, 3, 2])


def test_a_constant_shift_multiplies_that_of_the_size():
    both = RectifiedFlow(shift=2.0, size_shift=LinearShift())
    assert both.specialize(ClipSize(4, 4096)) == RectifiedFlow(shift=12.0)
    assert RectifiedFlow(shift=2.0).specialize(ClipSize(4, 4096)) == RectifiedFlow(shift=2.0)


@pytest.mark.parametrize("process", [LINEAR, EXPONENTIAL], ids=["linear", "exponential"])
def test_training_and_sampling_have_the_same_shift(process):
    """In training the sizes are arrays in a compiled step; in sampling they are numbers."""
    objective = FlowMatching(process=process, times=Uniform())
    sizes = ClipSize(jnp.asarray([1, 4, 16]), jnp.asarray([256, 1024, 4096]))
    for u in (0.25, 0.5, 0.75):
        trained = jax.jit(objective.compute_time)(jnp.full((3,), u), sizes)
        for index, size in enumerate(zip(*sizes, strict=True)):
            sampled = make_uniform_times(process.specialize(ClipSize(*map(int, size))), 4)
            assert trained[index] == pytest.approx(float(sampled[4 - round(4 * u)]), rel=1e-5)


def test_a_shift_by_size_without_a_size_is_refused():
    with pytest.raises(UserError, match="depends on a clip's size"):
        make_uniform_times(LINEAR, 4)


def test_a_shift_is_the_same_after_json():
    assert config_json.from_json(config_json.to_json(FlowMatching(process=EXPONENTIAL))) == FlowMatching(
        process=EXPONENTIAL
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearShift(tokens=(4096, 256)), "the smaller first"),
        (lambda: ExponentialShift(tokens=(0, 256)), "the smaller first"),
        (lambda: LinearShift(shifts=(0.01, 5.0)), "positive at 1 token too"),
    ],
)
def test_invalid_shifts_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
