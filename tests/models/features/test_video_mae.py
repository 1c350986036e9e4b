import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.models.features.convolutional import resize_frames
from dit_video.models.features.video_mae import VideoMaeConfig, make_position_table
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.weights.feature_networks import load_video_mae, make_video_mae_tensor_map
from support.random_params import make_random_params

CONFIG = VideoMaeConfig(width=12, layers=2, heads=3, mlp_width=20, side=8, patch=4, frames=4)
GRAPH = get_graph_def(CONFIG.make)
PARAMS = make_random_params(CONFIG.make)
CLIPS = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8, 3)), jnp.float32)


@jax.jit
def extract(clips, params=PARAMS):
    return nnx.merge(GRAPH, params)(clips)


def make_tensors(root=""):
    """Return the parameters in the published names and layout, with a layer of classes, which is not read."""
    tensor_map = make_video_mae_tensor_map(CONFIG, root=root)
    tensors = {f"{root}head.weight": np.ones((5, 12), np.float32), f"{root}head.bias": np.ones(5, np.float32)}
    for path, values in trees.flatten(PARAMS).items():
        mapping, values = tensor_map[path], np.asarray(values)
        for name, value in zip(mapping.names, values if mapping.layers else [values], strict=True):
            tensors[name] = np.array(mapping.to_theirs(value), order="C")
    return tensors


def assert_equal_params(actual):
    jax.tree.map(np.testing.assert_array_equal, actual, jax.tree.map(np.asarray, PARAMS))


def test_the_default_is_the_published_vit_giant():
    config = VideoMaeConfig()
    shapes = get_param_shapes(config.make)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_011_610_752
    assert config.grid == (8, 16, 16)


def test_features_of_a_clip_do_not_depend_on_its_neighbours():
    alone = extract(jnp.concatenate([CLIPS[:1], CLIPS[:1]]))
    np.testing.assert_allclose(extract(CLIPS)[0], alone[0], atol=1e-5)
    assert np.abs(extract(CLIPS)[0] - extract(CLIPS)[1]).max() > 1e-3


def test_features_depend_on_the_order_of_frames_and_of_rows():
    features = extract(CLIPS)
    for other in (CLIPS[:, ::-1], CLIPS[:, :, ::-1]):
        assert np.abs(features - extract(other)).max() > 1e-3


def test_without_blocks_the_features_are_the_normalised_mean_of_patches_and_positions():
    params = trees.flatten(PARAMS)
    silent = {
        path: jnp.zeros_like(leaf) if path.startswith(("blocks/out", "blocks/down")) else leaf
        for path, leaf in params.items()
    }
    pixels = np.asarray((CLIPS + 1) / 2)
    kernel = np.asarray(params["embed/kernel"]).reshape(2, 4, 4, 3, 12)
    positions = make_position_table(CONFIG, 2).reshape(2, 2, 2, 12)
    tokens = [
        np.einsum("brpqC,rpqCD->bD", pixels[:, 2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4], kernel)
        + np.asarray(params["embed/bias"])
        + positions[t, h, w]
        for t in range(2)
        for h in range(2)
        for w in range(2)
    ]
    mean = np.mean(tokens, axis=0)
    normal = (mean - mean.mean(axis=1, keepdims=True)) / np.sqrt(mean.var(axis=1, keepdims=True) + CONFIG.eps)
    expected = normal * np.asarray(params["norm/scale"]) + np.asarray(params["norm/shift"])
    np.testing.assert_allclose(extract(CLIPS, trees.unflatten(silent)), expected, atol=1e-4)


def test_longer_clips_have_positions_between_those_of_the_training():
    config = dataclasses.replace(CONFIG, frames=16)
    table = make_position_table(config, 8).reshape(8, 4, 12)
    longer = make_position_table(config, 12).reshape(12, 4, 12)
    np.testing.assert_array_equal(longer[0], table[0])
    np.testing.assert_array_equal(longer[-1], table[-1])
    steps = np.einsum("tnd,tnd->t", longer - longer[:1], longer - longer[:1])
    assert (steps[1:4] > 0).all()
    assert extract(jnp.concatenate([CLIPS, CLIPS], axis=1)).shape == (2, 12)


@pytest.mark.nightly
def test_resizing_interpolates_linearly_and_does_not_filter():
    ramp = jnp.asarray(np.broadcast_to(np.linspace(-1, 1, 8)[None, None, None, :, None], (1, 1, 8, 8, 3)), jnp.float32)
    np.testing.assert_allclose(resize_frames(ramp, height=8, width=8), ramp, atol=1e-6)
    half = resize_frames(ramp, height=4, width=4)
    np.testing.assert_allclose(half[0, 0, 0, :, 0], ramp[0, 0, 0].reshape(4, 2, 3).mean(axis=1)[:, 0], atol=1e-6)
    # Without a filter, a fourth of the size skips the first and last of every four pixels.
    peaks = jnp.zeros((1, 1, 8, 8, 3)).at[:, :, :, ::4].set(1)
    np.testing.assert_allclose(resize_frames(peaks, height=8, width=2), 0, atol=1e-6)


@pytest.mark.parametrize("root", ["", "module.", "model."])
def test_a_state_dict_is_read_alone_or_within_a_dictionary(tmp_path, root):
    path = tmp_path / "video_mae.safetensors"
    others = {"optimizer.step": np.zeros(1, np.float32)} if root else {}
    safetensors.numpy.save_file(make_tensors(root) | others, path)
    assert_equal_params(load_video_mae(path, CONFIG))


def test_missing_tensors_and_those_of_other_sizes_are_refused(tmp_path):
    path = tmp_path / "video_mae.safetensors"
    with pytest.raises(MissingError, match=r"vit_g_hybrid_pt_1200e_ssv2_ft.pth"):
        load_video_mae(path, CONFIG)
    tensors = make_tensors()
    del tensors["blocks.1.attn.q_bias"]
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.q_bias"):
        load_video_mae(path, CONFIG)
    safetensors.numpy.save_file(make_tensors() | {"blocks.0.gamma_1": np.ones(12, np.float32)}, path)
    with pytest.raises(UserError, match=r"gamma_1"):
        load_video_mae(path, CONFIG)
    safetensors.numpy.save_file(make_tensors(), path)
    with pytest.raises(UserError, match=r"qkv|fc1"):
        load_video_mae(path, dataclasses.replace(CONFIG, mlp_width=24))
    pickle = tmp_path / "video_mae.pth"
    pickle.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"pickled"):
        load_video_mae(pickle, CONFIG)


@pytest.mark.parametrize(("shape", "part"), [((1, 3, 8, 8, 3), "3 frames"), ((1, 4, 8, 12, 3), "8x12")])
def test_clips_of_other_sizes_are_refused(shape, part):
    with pytest.raises(UserError, match=part):
        nnx.merge(GRAPH, PARAMS)(jnp.zeros(shape))


@pytest.mark.parametrize(("field", "value"), [("heads", 5), ("patch", 3), ("patch_frames", 3), ("layers", 0)])
def test_sizes_that_do_not_divide_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        dataclasses.replace(CONFIG, **{field: value})
