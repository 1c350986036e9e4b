"""I3D and Inception-v3 equal their published architectures, written with PyTorch's own operations."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core import trees
from dit_video.models.features.convolutional import I3D_BLOCKS, C3d, I3d, InceptionV3
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.weights.feature_networks import (
    load_c3d,
    load_i3d,
    load_inception,
    make_c3d_tensor_map,
    make_i3d_tensor_map,
    make_inception_tensor_map,
)

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("optimized_compilation")]
torch = pytest.importorskip("torch")
functional = torch.nn.functional


def make_weights(make, tensor_map) -> dict[str, np.ndarray]:
    """Return random tensors in the published layout, of a scale that keeps features in range."""
    generator = np.random.default_rng(0)
    arrays = {}
    for path, leaf in trees.flatten(get_param_shapes(make)).items():
        values = generator.standard_normal(leaf.shape)
        if path.endswith("kernel"):
            values *= (2 / np.prod(leaf.shape[:-1])) ** 0.5
        elif path.endswith("variance"):
            values = np.exp(0.3 * values)
        else:
            values = 0.2 * values + path.endswith("scale")
        arrays[tensor_map[path].name] = np.ascontiguousarray(tensor_map[path].to_theirs(values.astype(np.float32)))
    return arrays


def pad_same(x, kernel, stride):
    """Pad with zeros as TensorFlow does."""
    pads = []
    for size, length, step in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // step) - 1) * step + length - size, 0)
        pads += [total // 2, total - total // 2]
    return functional.pad(x, pads)


class TorchI3d:
    def __init__(self, weights):
        self.weights = {name: torch.from_numpy(array) for name, array in weights.items()}

    def unit(self, name, x, stride=(1, 1, 1)):
        kernel = self.weights[f"{name}.conv3d.weight"]
        x = functional.conv3d(pad_same(x, kernel.shape[2:], stride), kernel, stride=stride)
        mean, variance, scale, bias = (
            self.weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu(functional.batch_norm(x, mean, variance, scale, bias, eps=1e-3))

    def pool(self, x, kernel, stride):
        return functional.max_pool3d(pad_same(x, kernel, stride), kernel, stride)

    def mixed(self, name, x):
        one = self.unit(f"{name}.b0", x)
        two = self.unit(f"{name}.b1b", self.unit(f"{name}.b1a", x))
        three = self.unit(f"{name}.b2b", self.unit(f"{name}.b2a", x))
        four = self.unit(f"{name}.b3b", self.pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([one, two, three, four], dim=1)

    def __call__(self, x):
        x = self.pool(self.unit("Conv3d_1a_7x7", x, (2, 2, 2)), (1, 3, 3), (1, 2, 2))
        x = self.unit("Conv3d_2c_3x3", self.unit("Conv3d_2b_1x1", x))
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        for name in I3D_BLOCKS:
            if name == "4b":
                x = self.pool(x, (3, 3, 3), (2, 2, 2))
            if name == "5b":
                x = self.pool(x, (2, 2, 2), (2, 2, 2))
            x = self.mixed(f"Mixed_{name}", x)
        x = functional.avg_pool3d(x, (2, 7, 7), (1, 1, 1))
        logits = functional.conv3d(x, self.weights["logits.conv3d.weight"], self.weights["logits.conv3d.bias"])
        return logits.mean(dim=(2, 3, 4))


class TorchInception:
    """The network of pytorch-fid: torchvision's with other pools."""

    def __init__(self, weights):
        self.weights = {name: torch.from_numpy(array) for name, array in weights.items()}

    def unit(self, name, x, stride=1, padding=0):
        x = functional.conv2d(x, self.weights[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, variance, scale, bias = (
            self.weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.relu(functional.batch_norm(x, mean, variance, scale, bias, eps=1e-3))

    def mean_pool(self, x):
        return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def block_a(self, name, x):
        five = self.unit(f"{name}.branch5x5_2", self.unit(f"{name}.branch5x5_1", x), padding=2)
        three = self.unit(f"{name}.branch3x3dbl_1", x)
        for number in (2, 3):
            three = self.unit(f"{name}.branch3x3dbl_{number}", three, padding=1)
        pooled = self.unit(f"{name}.branch_pool", self.mean_pool(x))
        return torch.cat([self.unit(f"{name}.branch1x1", x), five, three, pooled], dim=1)

    def block_b(self, name, x):
        three = self.unit(f"{name}.branch3x3dbl_2", self.unit(f"{name}.branch3x3dbl_1", x), padding=1)
        three = self.unit(f"{name}.branch3x3dbl_3", three, stride=2)
        single = self.unit(f"{name}.branch3x3", x, stride=2)
        return torch.cat([single, three, functional.max_pool2d(x, 3, stride=2)], dim=1)

    def block_c(self, name, x):
        wide, tall = (0, 3), (3, 0)
        seven = self.unit(f"{name}.branch7x7_2", self.unit(f"{name}.branch7x7_1", x), padding=wide)
        seven = self.unit(f"{name}.branch7x7_3", seven, padding=tall)
        double = self.unit(f"{name}.branch7x7dbl_1", x)
        for number, padding in enumerate((tall, wide, tall, wide), 2):
            double = self.unit(f"{name}.branch7x7dbl_{number}", double, padding=padding)
        pooled = self.unit(f"{name}.branch_pool", self.mean_pool(x))
        return torch.cat([self.unit(f"{name}.branch1x1", x), seven, double, pooled], dim=1)

    def block_d(self, name, x):
        three = self.unit(f"{name}.branch3x3_2", self.unit(f"{name}.branch3x3_1", x), stride=2)
        seven = self.unit(f"{name}.branch7x7x3_1", x)
        seven = self.unit(f"{name}.branch7x7x3_2", seven, padding=(0, 3))
        seven = self.unit(f"{name}.branch7x7x3_3", seven, padding=(3, 0))
        seven = self.unit(f"{name}.branch7x7x3_4", seven, stride=2)
        return torch.cat([three, seven, functional.max_pool2d(x, 3, stride=2)], dim=1)

    def block_e(self, name, x, *, has_mean_pool):
        def split(branch, y):
            return [
                self.unit(f"{name}.{branch}a", y, padding=(0, 1)),
                self.unit(f"{name}.{branch}b", y, padding=(1, 0)),
            ]

        three = split("branch3x3_2", self.unit(f"{name}.branch3x3_1", x))
        double = self.unit(f"{name}.branch3x3dbl_2", self.unit(f"{name}.branch3x3dbl_1", x), padding=1)
        pooled = self.mean_pool(x) if has_mean_pool else functional.max_pool2d(x, 3, stride=1, padding=1)
        parts = [self.unit(f"{name}.branch1x1", x), *three, *split("branch3x3dbl_3", double)]
        return torch.cat([*parts, self.unit(f"{name}.branch_pool", pooled)], dim=1)

    def __call__(self, x):
        x = self.unit("Conv2d_2a_3x3", self.unit("Conv2d_1a_3x3", x, stride=2))
        x = functional.max_pool2d(self.unit("Conv2d_2b_3x3", x, padding=1), 3, stride=2)
        x = functional.max_pool2d(self.unit("Conv2d_4a_3x3", self.unit("Conv2d_3b_1x1", x)), 3, stride=2)
        for name in ("5b", "5c", "5d"):
            x = self.block_a(f"Mixed_{name}", x)
        x = self.block_b("Mixed_6a", x)
        for name in ("6b", "6c", "6d", "6e"):
            x = self.block_c(f"Mixed_{name}", x)
        x = self.block_d("Mixed_7a", x)
        x = self.block_e("Mixed_7b", x, has_mean_pool=True)
        return self.block_e("Mixed_7c", x, has_mean_pool=False).mean(dim=(2, 3))


def compute_c3d(weights, x):
    """Return the logits of Caffe's network; chainer's pools have a last window that is partly outside."""
    convolutions = ("conv1a", "conv2a", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b")
    for name in convolutions:
        x = functional.relu(functional.conv3d(x, weights[f"{name}/W"], weights[f"{name}/b"], padding=1))
        if name == "conv1a":
            x = functional.max_pool3d(x, (1, 2, 2), ceil_mode=True)
        elif name in ("conv2a", "conv3b", "conv4b", "conv5b"):
            x = functional.max_pool3d(x, 2, ceil_mode=True)
    x = x.flatten(1)
    for name in ("fc6", "fc7"):
        x = functional.relu(functional.linear(x, weights[f"{name}/W"], weights[f"{name}/b"]))
    return functional.linear(x, weights["fc8/W"], weights["fc8/b"])


def check(actual, expected):
    expected = expected.numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("frames", [9, pytest.param(16, marks=pytest.mark.nightly)])
def test_i3d_equals_its_published_architecture(tmp_path, frames):
    def make(rngs):
        return I3d(rngs=rngs)

    weights = make_weights(make, make_i3d_tensor_map())
    safetensors.numpy.save_file(weights, tmp_path / "i3d.safetensors")
    model = nnx.merge(get_graph_def(make), load_i3d(tmp_path / "i3d.safetensors"))
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, frames, 224, 224, 3)).astype(np.float32)
    expected = TorchI3d(weights)(torch.from_numpy(pixels).permute(0, 4, 1, 2, 3))
    check(model(jnp.asarray(pixels)), expected)


def test_inception_equals_its_published_architecture(tmp_path):
    def make(rngs):
        return InceptionV3(rngs=rngs)

    weights = make_weights(make, make_inception_tensor_map())
    safetensors.numpy.save_file(weights, tmp_path / "inception.safetensors")
    model = nnx.merge(get_graph_def(make), load_inception(tmp_path / "inception.safetensors"))
    images = np.random.default_rng(1).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
    features = model(jnp.asarray(images))
    expected = TorchInception(weights)(torch.from_numpy(images).permute(0, 3, 1, 2))
    check(features, expected)
    check(model.classify(features), expected @ torch.from_numpy(weights["fc.weight"]).T)


@pytest.mark.nightly
def test_c3d_equals_its_published_architecture(tmp_path):
    def make(rngs):
        return C3d(rngs=rngs)

    weights = make_weights(make, make_c3d_tensor_map())
    mean = weights.pop("mean")
    np.savez(tmp_path / "c3d.npz", **weights)
    np.savez(tmp_path / "mean2.npz", mean=np.pad(mean, ((0, 0), (0, 0), (8, 8), (8, 8)), constant_values=1e6))
    model = nnx.merge(get_graph_def(make), load_c3d(tmp_path / "c3d.npz", mean=tmp_path / "mean2.npz"))
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 16, 112, 112, 3)).astype(np.float32)
    x = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3)
    x = 128 * x[:, [2, 1, 0]] + 128 - torch.from_numpy(mean)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    check(model(jnp.asarray(pixels)), compute_c3d(tensors, x))
