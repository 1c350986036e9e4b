import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.models.features import ClipImageProcessor, FrameEncoder
from dit_video.models.features.clip import preprocess_frames
from dit_video.nn import get_graph_def
from support.random_params import make_random_params
from support.tiny_clip import VISION

IMAGES = ClipImageProcessor(resize=12, crop=(12, 12))
PARAMS = make_random_params(VISION.make)
FRAMES = np.random.default_rng(0).integers(0, 256, (7, 20, 31, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def expected():
    """Return the features of all frames at once."""
    return nnx.merge(get_graph_def(VISION.make), PARAMS)(jnp.asarray(preprocess_frames(FRAMES, IMAGES)))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("part", "shape"),
    [("values", (10, 12)), pytest.param("penultimate", (10, 12), marks=pytest.mark.slow), ("projected", (6,))],
)
def test_batches_give_each_frame_s_features(expected, part, shape):
    encode = FrameEncoder(VISION, PARAMS, IMAGES, feature=part, batch=3)
    result = encode(FRAMES)  # two batches and a single frame
    assert result.shape == (7, *shape)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, getattr(expected, part), atol=1e-5)
    np.testing.assert_allclose(encode(FRAMES[:2]), getattr(expected, part)[:2], atol=1e-5)  # is filled up


def test_settings_and_frames_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"crop=\(224, 224\) .*12x12"):
        FrameEncoder(VISION, PARAMS, ClipImageProcessor())
    with pytest.raises(UserError, match=r"no projection. Use 'pooled'"):
        FrameEncoder(dataclasses.replace(VISION, projection=None), PARAMS, IMAGES)
    with pytest.raises(UserError, match=r"batch=0 .*at least 1"):
        FrameEncoder(VISION, PARAMS, IMAGES, batch=0)
    with pytest.raises(UserError, match=r"12x18 .*12x12"):
        FrameEncoder(VISION, PARAMS, ClipImageProcessor(resize=12, crop=None))(FRAMES)
    with pytest.raises(UserError, match="at least one frame"):
        FrameEncoder(VISION, PARAMS, IMAGES)(FRAMES[:0])
