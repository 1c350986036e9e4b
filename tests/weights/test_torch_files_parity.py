"""PyTorch's files as this version of it writes them."""

import argparse

import ml_dtypes
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.weights.torch_files import read_torch_tensors

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")


def make_state() -> dict[str, "torch.Tensor"]:
    shared = torch.arange(24.0)
    return {
        "transposed": shared.reshape(4, 6).t(),
        "part": shared[5:11:2],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "half": torch.linspace(-1, 1, 7).half(),
        "rounded": torch.linspace(-1, 1, 7).bfloat16(),
        "count": torch.tensor([3, -4]),
        "mask": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }


def to_numpy(tensor: "torch.Tensor") -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


@pytest.mark.parametrize("is_archive", [True, False])
def test_equals_what_was_saved(tmp_path, is_archive):
    state = make_state()
    path = tmp_path / "model.pt"
    content = {"state_dict": state, "epoch": 3, "sizes": [torch.Size((1, 2)), (4, None)], "dtype": torch.float32}
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    tensors = read_torch_tensors(path)
    assert tensors.keys() == {f"state_dict.{name}" for name in state}
    for name, expected in state.items():
        actual = tensors[f"state_dict.{name}"]
        assert actual.dtype == to_numpy(expected).dtype
        np.testing.assert_array_equal(actual, to_numpy(expected))


def test_reads_state_dicts_and_compiled_modules(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv3d(3, 4, (1, 2, 3)), torch.nn.BatchNorm3d(4), torch.nn.ReLU()).eval()
    torch.save(module.state_dict(), tmp_path / "state.pt")
    torch.jit.save(torch.jit.script(module), tmp_path / "compiled.pt")
    expected = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    for file in ("state.pt", "compiled.pt"):
        tensors = read_torch_tensors(tmp_path / file)
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize("is_archive", [True, False])
def test_refuses_modules_and_other_objects(tmp_path, is_archive):
    for content in (torch.nn.Linear(2, 2), {"args": argparse.Namespace(steps=3), "w": torch.ones(2)}):
        torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=is_archive)
        with pytest.raises(UserError, match=r"(Linear|Namespace).*neither a tensor nor a plain container"):
            read_torch_tensors(tmp_path / "model.pt")
