"""Files of kernels that are not arrays: what they hold is read again, and what does not fit is refused."""

import json
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dit_video.core import registry
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.nn import Kernel
from dit_video.weights import load, load_metadata, save
from dit_video.weights.io import read_params_file
from dit_video.weights.streaming import ParamsSource


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Doubled(Kernel):
    """The kernel `2 * half`."""

    half: Any

    @property
    def shape(self):
        return self.half.shape

    @property
    def dtype(self):
        return self.half.dtype

    def matmul(self, x, precision=None, weight_constraint=None):
        return 2 * jnp.matmul(x, self.half, precision=precision)


HALF = np.arange(6.0, dtype=np.float32).reshape(2, 3)
PARAMS = {"embed": {"kernel": Doubled(HALF), "bias": np.ones(3, np.float32)}}
LIKE = {
    "embed": {
        "kernel": jax.ShapeDtypeStruct((2, 3), np.float32),
        "bias": jax.ShapeDtypeStruct((3,), np.float32),
    }
}
NAME = f"{__name__}:Doubled"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Return a file of the parameters, while their kernel is registered."""
    monkeypatch.setattr(registry, "_CLASSES", {NAME: Doubled})
    save(tmp_path / "weights.safetensors", PARAMS)
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("read", [lambda path: load(path, like=LIKE), lambda path: read_params_file(path, LIKE)])
def test_a_kernel_is_read_as_it_was_written(file, read):
    params = read(file)
    assert isinstance(params["embed"]["kernel"], Doubled)
    for path, leaf in flatten(PARAMS).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf)
    assert json.loads(load_metadata(file)["kernels"]) == {"embed/kernel": NAME}


def test_weights_without_kernels_have_no_metadata_of_them(tmp_path):
    save(tmp_path / "plain.safetensors", {"kernel": HALF})
    assert load_metadata(tmp_path / "plain.safetensors") == {}


def test_a_class_that_is_not_registered_is_neither_written_nor_read(file, monkeypatch):
    monkeypatch.setattr(registry, "_CLASSES", {})
    with pytest.raises(UserError, match=r"embed/kernel cannot be written: .*Doubled is not registered.*register"):
        save(file, PARAMS)
    with pytest.raises(UserError, match=r"embed/kernel is a .*Doubled, which is not registered as a kernel"):
        load(file, like=LIKE)


@pytest.mark.parametrize(
    ("tensors", "path", "message"),
    [
        ({"embed/kernel/half": HALF[:, :2]}, "embed/kernel", r"stands for \[2, 2\], the model has \[2, 3\]"),
        ({"embed/kernel": HALF}, "embed/kernel", "the file lacks its half"),
        ({"head/kernel/half": HALF}, "head/kernel", "a kernel head/kernel, which the model lacks; .*embed/kernel"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(file, tensors, path, message):
    rest = {"embed/bias": PARAMS["embed"]["bias"]}
    save_file({**tensors, **rest}, file, metadata={"kernels": json.dumps({path: NAME})})
    with pytest.raises(UserError, match=message):
        load(file, like=LIKE)


def test_other_programs_formats_refuse_a_kernel():
    with pytest.raises(UserError, match=r"embed/kernel is a Doubled, not an array.* Use Pipeline.save"):
        ParamsSource(PARAMS)
