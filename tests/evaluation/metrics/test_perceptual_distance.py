"""LPIPS as a metric; tests/weights/test_lpips.py compares the network with the package."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core.errors import MissingError, UserError
from dit_video.core.pixels import to_float
from dit_video.core.trees import flatten
from dit_video.evaluation.metrics.metric import ClipReconstruction, MetricBatch
from dit_video.evaluation.metrics.reconstruction import PerceptualDistance, compute_perceptual_distance
from dit_video.models.features import Lpips
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.video import Clip
from dit_video.weights import load_lpips
from dit_video.weights.feature_networks import make_lpips_tensor_map

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return a file of random weights of the whole network."""
    generator, names, arrays = np.random.default_rng(1), make_lpips_tensor_map(), {}
    for path, leaf in flatten(get_param_shapes(lambda rngs: Lpips(rngs=rngs))).items():
        scale = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if path.endswith("kernel") else 0.01
        values = generator.normal(size=leaf.shape, scale=scale).astype(np.float32)
        values = np.abs(values) if path.startswith("weights") else values
        arrays[names[path].name] = np.ascontiguousarray(names[path].to_theirs(values))
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    safetensors.numpy.save_file(arrays, file)
    return str(file)


def add_noise(frames, strength):
    noise = np.random.default_rng(2).normal(size=frames.shape)
    return np.clip(frames + strength * noise, 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_equal_clips_have_no_distance_and_noise_raises_it(weights):
    clip = FRAMES[:2]
    assert compute_perceptual_distance(clip, clip, weights=weights) == 0
    values = [compute_perceptual_distance(clip, add_noise(clip, s), weights=weights) for s in (5.0, 20.0, 80.0)]
    assert 0 < values[0] < values[1] < values[2]


@pytest.mark.slow
def test_the_distance_in_chunks_is_that_of_the_network(weights):
    other = add_noise(FRAMES, 30.0)
    network = nnx.merge(get_graph_def(lambda rngs: Lpips(rngs=rngs)), load_lpips(weights))
    expected = jax.jit(network)(*(jnp.asarray(to_float(each))[None] for each in (FRAMES, other)))
    # Two chunks of two frames, of which the last is filled up: were it averaged, the value would differ.
    value = compute_perceptual_distance(FRAMES, other, weights=weights, chunk_pixels=2 * 16 * 16)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)


@pytest.mark.nightly
def test_the_weights_are_read_once_and_named_in_the_note(weights, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(weights).read_bytes())
    metric, clip = PerceptualDistance(weights=str(copy)), Clip(frames=FRAMES[:2], fps=8)
    pair = ClipReconstruction("clip", clip, Clip(frames=add_noise(FRAMES[:2], 20.0), fps=8))
    state = metric.update(metric.init(), MetricBatch(pairs=[pair]))
    copy.unlink()
    state = metric.update(state, MetricBatch(pairs=[pair]))
    value = metric.compute(state)["perceptual_distance"]
    assert state[0] == state[1] == value.value
    assert value.count == 2
    assert value.note.startswith("LPIPS ")
    assert len(value.note) > 12


def test_a_missing_file_is_named(tmp_path):
    path = str(tmp_path / "absent.safetensors")
    pair = ClipReconstruction("clip", *[Clip(frames=FRAMES, fps=8)] * 2)
    metric = PerceptualDistance(weights=path)
    with pytest.raises(MissingError, match=r"absent\.safetensors"):
        metric.measure(MetricBatch(pairs=[pair]))
    empty = metric.compute(metric.init())["perceptual_distance"]  # needs no weights
    assert (empty.value, empty.count) == (None, 0)


def test_small_and_unlike_frames_are_refused(weights):
    with pytest.raises(UserError, match="16x16 or more"):
        compute_perceptual_distance(FRAMES[:, :15], FRAMES[:, :15], weights=weights)
    with pytest.raises(UserError, match="resize or cut one of them"):
        compute_perceptual_distance(FRAMES, FRAMES[:2], weights=weights)
