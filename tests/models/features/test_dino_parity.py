"""DINO equals its published architecture, written with PyTorch's own operations; frames are resized as by VBench."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core import trees
from dit_video.evaluation.vbench import crop_bicubic, open_dino
from dit_video.models.features.dino import DinoConfig
from dit_video.nn import get_graph_def
from dit_video.video import Clip
from dit_video.weights.feature_networks import load_aesthetic_predictor, load_dino, make_dino_tensor_map
from dit_video.weights.torch_files import convert_torch_file
from support.random_params import make_random_params

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
functional = torch.nn.functional

CONFIG = DinoConfig(width=48, layers=3, heads=4, mlp_width=80, side=32, patch=8)


def make_weights(config):
    """Return random tensors in the published names and layout."""
    arrays, tensor_map = {}, make_dino_tensor_map(config)
    for path, values in trees.flatten(make_random_params(config.make)).items():
        mapping, values = tensor_map[path], np.asarray(values)
        for name, value in zip(mapping.names, values if mapping.layers else [values], strict=True):
            arrays[name] = np.array(mapping.to_theirs(value), order="C")
    return arrays


class TorchDino:
    def __init__(self, config, weights):
        self.config = config
        self.weights = {name: torch.from_numpy(array) for name, array in weights.items()}

    def norm(self, name, x):
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps=self.config.eps)

    def linear(self, name, x):
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def interpolate_positions(self, rows, columns):
        table, grid = self.weights["pos_embed"], self.config.grid
        if rows == columns == grid:
            return table
        patches = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
        patches = functional.interpolate(patches, scale_factor=scale, mode="bicubic").permute(0, 2, 3, 1)
        return torch.cat([table[:, :1], patches.flatten(1, 2)], dim=1)

    def __call__(self, x):
        patch = self.config.patch
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        kernel, bias = self.weights["patch_embed.proj.weight"], self.weights["patch_embed.proj.bias"]
        x = functional.conv2d(x, kernel, bias, stride=patch).flatten(2).transpose(1, 2)
        x = torch.cat([self.weights["cls_token"].expand(len(x), -1, -1), x], dim=1)
        x = x + self.interpolate_positions(rows, columns)
        for layer in range(self.config.layers):
            block = f"blocks.{layer}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x))
            q, k, v = qkv.unflatten(2, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
            x = x + self.linear(f"{block}.attn.proj", (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
            hidden = functional.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm("norm", x)[:, 0]


def load(path, weights):
    safetensors.numpy.save_file(weights, path)
    return nnx.merge(get_graph_def(CONFIG.make), load_dino(path, CONFIG))


@pytest.mark.parametrize("size", [(32, 32), (32, 56), (48, 40), (16, 16)])
def test_dino_equals_its_published_architecture(tmp_path, size):
    weights = make_weights(CONFIG)
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    expected = TorchDino(CONFIG, weights)(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert np.abs(expected).max() > 0.5
    result = load(tmp_path / "dino.safetensors", weights)(jnp.asarray(images))
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("size", [(48, 80), (80, 48), (20, 24)])
def test_frames_are_resized_as_vbench_does(tmp_path, size):
    """Bilinear for DINO, bicubic and cropped for CLIP, both without antialiasing."""
    frames = np.random.default_rng(2).integers(0, 256, (3, *size, 3), np.uint8)
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    short, long = min(size), max(size)
    target = [32 if side == short else 32 * long // short for side in size]
    weights = make_weights(CONFIG)
    resized = functional.interpolate(images, size=target, mode="bilinear") / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = TorchDino(CONFIG, weights)((resized - mean) / std).numpy()
    safetensors.numpy.save_file(weights, tmp_path / "dino.safetensors")
    features = open_dino(CONFIG, load_dino(tmp_path / "dino.safetensors", CONFIG), "small")
    np.testing.assert_allclose(features.extract([Clip(frames, fps=8)]), expected, atol=2e-4)
    cubic = functional.interpolate(images, size=target, mode="bicubic")
    top, left = (round((side - 32) / 2) for side in target)
    cropped = cubic[:, :, top : top + 32, left : left + 32].permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(crop_bicubic(jnp.asarray(frames, jnp.float32), 32), cropped, atol=1e-2)


def test_the_published_files_are_converted_and_read(tmp_path):
    weights = make_weights(CONFIG)
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, tmp_path / "dino.pth")
    convert_torch_file(tmp_path / "dino.pth", tmp_path / "dino.safetensors")
    load_dino(tmp_path / "dino.safetensors", CONFIG)
    linear = torch.nn.Linear(768, 1)
    torch.save(linear.state_dict(), tmp_path / "aesthetic.pth")
    convert_torch_file(tmp_path / "aesthetic.pth", tmp_path / "aesthetic.safetensors")
    kernel, bias = load_aesthetic_predictor(tmp_path / "aesthetic.safetensors")
    rows = np.random.default_rng(0).normal(size=(4, 768)).astype(np.float32)
    np.testing.assert_allclose(rows @ kernel + bias, linear(torch.from_numpy(rows)).detach().numpy(), atol=1e-5)
