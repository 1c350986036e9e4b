"""Files of networks that the user made of published weights."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from dit_video.core.errors import UserError
from dit_video.nn import Linear, get_param_shapes
from dit_video.weights.io import read_network_file
from dit_video.weights.tensor_map import TensorMapping

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
