"""VideoMAE equals its published architecture, written with PyTorch's own operations, and that of `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core import trees
from dit_video.models.features.convolutional import resize_frames
from dit_video.models.features.video_mae import VideoMaeConfig, make_position_table
from dit_video.nn import get_graph_def
from dit_video.weights.feature_networks import load_video_mae, make_video_mae_tensor_map
from dit_video.weights.torch_files import convert_torch_file
from support.random_params import make_random_params

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
functional = torch.nn.functional

CONFIG = VideoMaeConfig(width=48, layers=3, heads=4, mlp_width=80, side=28, patch=14, frames=8)


def make_weights(config, *, root=""):
    """Return random tensors in the published names and layout."""
    arrays, tensor_map = {}, make_video_mae_tensor_map(config, root=root)
    for path, values in trees.flatten(make_random_params(config.make)).items():
        mapping, values = tensor_map[path], np.asarray(values)
        for name, value in zip(mapping.names, values if mapping.layers else [values], strict=True):
            arrays[name] = np.array(mapping.to_theirs(value), order="C")
    return arrays


def make_sinusoids(count, width):
    exponents = torch.div(torch.arange(width), 2, rounding_mode="floor").double() * 2 / width
    angles = torch.arange(count)[:, None] / 10_000**exponents
    table = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)
    return table.float()


def interpolate_positions(config, length):
    """Return the positions of a clip of `length` tokens in time."""
    steps, rows, columns = config.grid
    table = make_sinusoids(steps * rows * columns, config.width)
    if length == steps:
        return table
    volume = table.T.reshape(1, config.width, steps, rows, columns)
    scale = ((length + 0.1) / steps, 1, 1)
    return functional.interpolate(volume, scale_factor=scale, mode="trilinear").reshape(config.width, -1).T


class TorchVideoMae:
    def __init__(self, config, weights):
        self.config = config
        self.weights = {name: torch.from_numpy(array) for name, array in weights.items()}

    def norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps=self.config.eps)

    def linear(self, name, x):
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def attend(self, name, x):
        query_bias, value_bias = self.weights[f"{name}.q_bias"], self.weights[f"{name}.v_bias"]
        bias = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
        qkv = functional.linear(x, self.weights[f"{name}.qkv.weight"], bias)
        q, k, v = qkv.unflatten(2, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return self.linear(f"{name}.proj", (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    def __call__(self, x):
        stride = (self.config.patch_frames, self.config.patch, self.config.patch)
        kernel, bias = self.weights["patch_embed.proj.weight"], self.weights["patch_embed.proj.bias"]
        length = x.shape[2] // self.config.patch_frames
        x = functional.conv3d(x, kernel, bias, stride=stride).flatten(2).transpose(1, 2)
        x = x + interpolate_positions(self.config, length)
        for layer in range(self.config.layers):
            block = f"blocks.{layer}"
            x = x + self.attend(f"{block}.attn", self.norm(f"{block}.norm1", x))
            hidden = functional.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm("fc_norm", x.mean(dim=1))


def load(path, weights, config=CONFIG):
    safetensors.numpy.save_file(weights, path)
    return nnx.merge(get_graph_def(config.make), load_video_mae(path, config))


def draw_pixels(config, frames):
    shape = (2, frames, config.side, config.side, 3)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def check(actual, expected):
    expected = expected.detach().numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("frames", [4, 6, 8, 14])
def test_video_mae_equals_its_published_architecture(tmp_path, frames):
    weights = make_weights(CONFIG)
    model, pixels = load(tmp_path / "video_mae.safetensors", weights), draw_pixels(CONFIG, frames)
    expected = TorchVideoMae(CONFIG, weights)((torch.from_numpy(pixels).permute(0, 4, 1, 2, 3) + 1) / 2)
    check(model(jnp.asarray(pixels)), expected)


def test_the_published_file_is_converted_and_read(tmp_path):
    weights = make_weights(CONFIG)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    tensors |= {"head.weight": torch.ones(174, CONFIG.width), "head.bias": torch.ones(174)}
    torch.save({"module": tensors}, tmp_path / "video_mae.pth")
    convert_torch_file(tmp_path / "video_mae.pth", tmp_path / "video_mae.safetensors")
    converted = load_video_mae(tmp_path / "video_mae.safetensors", CONFIG)
    expected = make_random_params(CONFIG.make)
    jax.tree.map(np.testing.assert_array_equal, converted, jax.tree.map(np.asarray, expected))


def test_long_rows_of_tokens_equal_the_published_architecture(tmp_path):
    # The published clips have 2048 tokens, of which attention computes blocks.
    config = VideoMaeConfig(width=32, layers=1, heads=2, mlp_width=40)
    weights, pixels = make_weights(config), draw_pixels(config, 16)
    model = load(tmp_path / "video_mae.safetensors", weights, config)
    expected = TorchVideoMae(config, weights)((torch.from_numpy(pixels).permute(0, 4, 1, 2, 3) + 1) / 2)
    check(model(jnp.asarray(pixels)), expected)


def test_video_mae_equals_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = make_weights(CONFIG)
    model, pixels = load(tmp_path / "video_mae.safetensors", weights), draw_pixels(CONFIG, CONFIG.frames)
    theirs = transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(
            image_size=CONFIG.side,
            patch_size=CONFIG.patch,
            num_frames=CONFIG.frames,
            tubelet_size=CONFIG.patch_frames,
            hidden_size=CONFIG.width,
            num_hidden_layers=CONFIG.layers,
            num_attention_heads=CONFIG.heads,
            intermediate_size=CONFIG.mlp_width,
            layer_norm_eps=CONFIG.eps,
            use_mean_pooling=True,
            num_labels=CONFIG.width,
        )
    ).eval()
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    state = theirs.state_dict()
    renamed = rename_to_transformers(tensors) | {
        "classifier.weight": torch.eye(CONFIG.width),
        "classifier.bias": torch.zeros(CONFIG.width),
    }
    assert set(renamed) == set(state)
    theirs.load_state_dict(renamed)
    # That norm has the default of PyTorch, 1e-5, whatever the configuration says.
    theirs.fc_norm.eps = CONFIG.eps
    expected = theirs(pixel_values=(torch.from_numpy(pixels).permute(0, 1, 4, 2, 3) + 1) / 2).logits
    check(model(jnp.asarray(pixels)), expected)


def rename_to_transformers(tensors):
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("patch_embed.proj"):
            renamed[name.replace("patch_embed.proj", "videomae.embeddings.patch_embeddings.projection")] = tensor
        elif not name.startswith("blocks."):
            renamed[name] = tensor
        else:
            _, layer, rest = name.split(".", 2)
            block = f"videomae.encoder.layer.{layer}"
            if rest == "attn.qkv.weight":
                for part, values in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    renamed[f"{block}.attention.attention.{part}.weight"] = values
            elif rest in ("attn.q_bias", "attn.v_bias"):
                part = "query" if rest == "attn.q_bias" else "value"
                renamed[f"{block}.attention.attention.{part}.bias"] = tensor
            else:
                module, suffix = rest.rsplit(".", 1)
                renamed[f"{block}.{parts[module]}.{suffix}"] = tensor
    return renamed


@pytest.mark.parametrize("length", [4, 7, 8, 9, 16])
def test_positions_of_the_published_size_equal_the_reference_s(length):
    config = VideoMaeConfig()
    expected = interpolate_positions(config, length).numpy()
    np.testing.assert_allclose(make_position_table(config, length), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(64, 96), (240, 320), (224, 300), (511, 33)])
def test_resized_frames_equal_torch_s_without_a_filter(size):
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 2, *size, 3)).astype(np.float32)
    frames = torch.from_numpy(pixels[0]).permute(0, 3, 1, 2)
    options = {"size": (224, 224), "mode": "bilinear", "align_corners": False}
    expected = functional.interpolate(frames, **options).permute(0, 2, 3, 1).numpy()
    actual = resize_frames(jnp.asarray(pixels), height=224, width=224)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
    if size[0] > 224:
        filtered = functional.interpolate(frames, **options, antialias=True).permute(0, 2, 3, 1).numpy()
        assert np.abs(actual - filtered).max() > 0.1
