"""Folders in the native format, and files of networks that the user made of published weights."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from dit_video.core.errors import UserError
from dit_video.models.autoencoders import IdentityConfig
from dit_video.nn import Linear, get_param_shapes
from dit_video.weights.folders import read_document
from dit_video.weights.io import read_native, read_native_config, read_network_file, write_native
from dit_video.weights.streaming import ParamsSource
from dit_video.weights.tensor_map import TensorMapping


def test_a_model_without_parameters_comes_back(tmp_path):
    write_native(tmp_path, IdentityConfig(), ParamsSource({}))
    config = read_native_config(tmp_path, read_document(tmp_path))
    assert config == IdentityConfig()
    assert read_native(tmp_path, config) == {}


MAP = {"kernel": TensorMapping("weight", "o i -> i o"), "bias": TensorMapping("bias")}


def read(path):
    shapes = get_param_shapes(lambda rngs: Linear(3, 2, rngs=rngs))
    return read_network_file(path, MAP, shapes, network="Tiny", recipe="Make it.")


def test_values_that_are_not_finite_are_refused_with_the_file_and_the_parameter(tmp_path):
    arrays = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2, np.float32)}
    save_file(arrays, tmp_path / "good.safetensors")
    np.testing.assert_array_equal(read(tmp_path / "good.safetensors")["kernel"], arrays["weight"].T)
    arrays["bias"][1] = np.inf
    save_file(arrays, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"bad\.safetensors is invalid as Tiny weights: bias has values .* Make it\."):
        read(tmp_path / "bad.safetensors")
