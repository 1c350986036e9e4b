"""Files of LPIPS and of the networks that classify; tests of the models compare the networks themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.models.features import Lpips
from dit_video.models.features.convolutional import C3d
from dit_video.nn import get_graph_def, get_param_shapes
from dit_video.weights import load_lpips
from dit_video.weights.feature_networks import load_c3d, make_c3d_tensor_map, make_lpips_tensor_map
from dit_video.weights.streaming import FileMap

SHAPES = trees.flatten(get_param_shapes(lambda rngs: Lpips(rngs=rngs)))


def write_weights(path, **changes):
    """Write a file with the names of the package, including its constants; None leaves a tensor out."""
    names = make_lpips_tensor_map()
    arrays = {names[name].name: names[name].to_theirs(np.full(leaf.shape, 0.5, "f4")) for name, leaf in SHAPES.items()}
    arrays |= {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)} | changes
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    safetensors.numpy.save_file(arrays, path)
    return path


def test_every_parameter_has_a_tensor_of_its_own():
    names = make_lpips_tensor_map()
    assert names.keys() == SHAPES.keys()
    assert len({foreign.name for foreign in names.values()}) == len(names) == 31
    assert names["stages/4/2/kernel"].name == "net.slice5.28.weight"  # the last convolution of torchvision's VGG16


def test_the_weights_of_the_package_are_read(tmp_path):
    params = load_lpips(write_weights(tmp_path / "lpips.safetensors"))
    assert {path: leaf.shape for path, leaf in trees.flatten(params).items()} == {
        path: leaf.shape for path, leaf in SHAPES.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lin3.model.1.weight": None}, r"1 missing \(lin3.model.1.weight\)"),
        ({"net.slice1.0.weight": np.zeros((64, 3, 11, 11), np.float32)}, r"1 misshapen \(net.slice1.0.weight"),
        ({"lin5.model.1.weight": np.zeros((1, 9, 1, 1), np.float32)}, r"1 unexpected \(lin5.model.1.weight\)"),
    ],
)
def test_other_weights_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_lpips(write_weights(tmp_path / "lpips.safetensors", **changes))


def test_files_that_are_no_weights_are_refused_with_the_command(tmp_path):
    with pytest.raises(MissingError, match=r"no such file of LPIPS weights: .*make it with: python -c"):
        load_lpips(tmp_path / "lpips.safetensors")
    (tmp_path / "vgg.pth").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(UserError, match="pickled file"):
        load_lpips(tmp_path / "vgg.pth")
    (tmp_path / "vgg.bytes").write_bytes(b"something")
    with pytest.raises(UserError, match=r"is not a \.safetensors file"):
        load_lpips(tmp_path / "vgg.bytes")


def package(torch):
    """Return a random module with the names of `lpips.LPIPS(net="vgg")` of lpips 0.1.4, without torchvision."""
    nn = torch.nn
    widths = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
    layers, before = [], 3
    for width in widths:
        layers += [nn.MaxPool2d(2, 2)] if width == "M" else [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = before if width == "M" else width

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for number, (start, stop) in enumerate([(0, 4), (4, 9), (9, 16), (16, 23), (23, 30)], 1):
                part = nn.Sequential()
                for index in range(start, stop):
                    part.add_module(str(index), layers[index])
                self.add_module(f"slice{number}", part)

        def forward(self, x):
            result = []
            for part in self.children():
                x = part(x)
                result.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
            return result

    class Lin(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))

    class Package(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaling_layer = nn.Module()
            self.scaling_layer.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None])
            self.scaling_layer.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[None, :, None, None])
            self.net = Net()
            for index, width in enumerate((64, 128, 256, 512, 512)):
                self.add_module(f"lin{index}", Lin(width))
                nn.init.uniform_(getattr(self, f"lin{index}").model[1].weight)

        def forward(self, x, y):
            x, y = ((clip - self.scaling_layer.shift) / self.scaling_layer.scale for clip in (x, y))
            pairs = enumerate(zip(self.net(x), self.net(y), strict=True))
            return sum(getattr(self, f"lin{i}").model((a - b) ** 2).mean(dim=(1, 2, 3)) for i, (a, b) in pairs)

    return Package().eval()


@pytest.mark.parity
@pytest.mark.nightly
def test_the_distance_and_its_gradients_equal_the_package(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = package(torch)
    save_file(theirs.state_dict(), tmp_path / "lpips.safetensors")
    ours = nnx.merge(get_graph_def(lambda rngs: Lpips(rngs=rngs)), load_lpips(tmp_path / "lpips.safetensors"))
    one, other = np.random.default_rng(0).uniform(-1, 1, (2, 2, 1, 35, 32, 3)).astype(np.float32)
    weights = np.array([1.0, 2.0], np.float32)

    def weighted(x):
        values = ours(x, jnp.asarray(other))
        return (values * weights).sum(), values

    gradient, values = jax.jit(jax.grad(weighted, has_aux=True))(one)
    x, y = (torch.tensor(np.moveaxis(clips[:, 0], -1, 1)) for clips in (one, other))
    expected = theirs(x.requires_grad_(True), y)
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(values, expected.detach(), rtol=1e-5)
    target = np.moveaxis(x.grad.numpy(), 1, -1)[:, None]
    assert np.abs(gradient - target).max() < 1e-5 * np.abs(target).max()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the paths of C3D's weights, which hold their number at each name, and of its mean clip."""
    folder = tmp_path_factory.mktemp("c3d")
    shapes = FileMap.from_tensor_map(make_c3d_tensor_map()).compute_shapes(
        get_param_shapes(lambda rngs: C3d(rngs=rngs))
    )
    arrays = {name: np.full(shape, number, np.float16) for number, (name, shape) in enumerate(shapes.items())}
    arrays.pop("mean")
    np.savez(folder / "c3d.npz", **arrays, unused=np.zeros(3))
    np.savez(folder / "mean2.npz", mean=np.arange(3 * 16 * 128 * 171, dtype=np.float32).reshape(1, 3, 16, 128, 171))
    return folder / "c3d.npz", folder / "mean2.npz", arrays


@pytest.mark.slow
def test_parameters_are_those_of_the_names_in_float32_and_the_mean_its_middle(files):
    path, mean, arrays = files
    params = trees.flatten(load_c3d(path, mean=mean))
    for name, mapping in make_c3d_tensor_map().items():
        assert params[name].dtype == np.float32
        if name != "mean":
            np.testing.assert_array_equal(params[name], mapping.to_ours(arrays[mapping.name]))
    stored = np.load(mean)["mean"][0]
    np.testing.assert_array_equal(params["mean"], np.moveaxis(stored[:, :, 8:120, 8:120], 0, -1))


@pytest.mark.slow
def test_files_of_other_networks_are_refused_with_the_names(files, tmp_path):
    path, mean, arrays = files
    np.savez(tmp_path / "few.npz", **{name: each for name, each in arrays.items() if name != "fc7/W"})
    np.savez(tmp_path / "wide.npz", **arrays | {"fc8/b": np.zeros(7)})
    np.savez(tmp_path / "mean.npz", mean=np.zeros((3, 16, 112, 112)))
    (tmp_path / "torn.npz").write_bytes(path.read_bytes()[:-100])
    for name, message in (("few", r"few\.npz.*1 missing \(fc7/W"), ("wide", r"fc8/b \[7\] instead of \[101\]")):
        with pytest.raises(UserError, match=message):
            load_c3d(tmp_path / f"{name}.npz", mean=mean)
    with pytest.raises(UserError, match=r"mean\.npz is no mean clip.*112, 112"):
        load_c3d(path, mean=tmp_path / "mean.npz")
    with pytest.raises(UserError, match=r"torn\.npz is damaged"):
        load_c3d(tmp_path / "torn.npz", mean=mean)
    with pytest.raises(MissingError, match="nowhere"):
        load_c3d(tmp_path / "nowhere.npz", mean=mean)
