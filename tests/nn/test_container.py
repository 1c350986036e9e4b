import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_video.core.trees import flatten
from dit_video.nn import Linear, RmsNorm, get_graph_def, get_param_shapes, init_params, make_stack
from dit_video.nn.container import ParamRngs


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = RmsNorm(4)
        self.layers = nnx.List([Linear(4, 4, rngs=rngs), Linear(4, 4, bias=False, rngs=rngs)])
        self.blocks = make_stack(lambda r: Linear(4, 4, rngs=r), 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


PATHS = {
    "norm/scale": (4,),
    "layers/0/kernel": (4, 4),
    "layers/0/bias": (4,),
    "layers/1/kernel": (4, 4),
    "blocks/kernel": (3, 4, 4),
    "blocks/bias": (3, 4),
}


def test_parameters_are_a_plain_dictionary_of_arrays():
    params = init_params(Net, jax.random.key(0))
    assert {path: leaf.shape for path, leaf in flatten(params).items()} == PATHS

    def check(node):
        assert type(node) is dict or isinstance(node, jax.Array)
        for child in node.values() if isinstance(node, dict) else ():
            check(child)

    check(params)


def test_merged_parameters_are_the_module():
    net = Net(nnx.Rngs(jax.random.key(3)))
    merged = nnx.merge(get_graph_def(Net), init_params(Net, jax.random.key(3)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    np.testing.assert_array_equal(merged(x), net(x))


def test_keys_are_those_of_flax():
    ours, theirs = ParamRngs(jax.random.key(3)), nnx.Rngs(jax.random.key(3))
    for _ in range(3):
        np.testing.assert_array_equal(*(jax.random.key_data(rngs.params()) for rngs in (ours, theirs)))
    assert isinstance(ours, nnx.Rngs)


def test_a_structure_is_built_once():
    calls = []

    def make(rngs):
        calls.append(rngs)
        return Linear(4, 4, rngs=rngs)

    assert get_graph_def(make) is get_graph_def(make)
    assert len(calls) == 1


def test_traced_and_eager_parameters_are_the_same_and_depend_on_the_key():
    eager = flatten(init_params(Net, jax.random.key(1)))
    jitted = flatten(jax.jit(lambda key: init_params(Net, key))(jax.random.key(1)))
    other = flatten(init_params(Net, jax.random.key(2)))
    for path, leaf in eager.items():
        np.testing.assert_array_equal(jitted[path], leaf)
    assert (eager["layers/0/kernel"] != other["layers/0/kernel"]).any()


def test_every_matrix_has_weights_of_its_own():
    params = flatten(init_params(Net, jax.random.key(0)))
    matrices = [params["layers/0/kernel"], params["layers/1/kernel"], *params["blocks/kernel"]]
    assert len({np.asarray(matrix).tobytes() for matrix in matrices}) == 5


def test_shapes_and_structure_compute_no_parameter():
    def make(rngs):
        # Nobody can compute this parameter, which is a terabyte.
        return Linear(2**20, 2**18, rngs=rngs)

    assert get_param_shapes(make)["kernel"].shape == (2**20, 2**18)
    assert get_param_shapes(make)["kernel"].dtype == jnp.float32
    assert hash(get_graph_def(make)) == hash(get_graph_def(make))
    assert get_graph_def(make) == get_graph_def(make)
    assert get_graph_def(Net) != get_graph_def(make)
