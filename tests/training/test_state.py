import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_video.core.trees import flatten
from dit_video.training.state import TrainState, init_state
from support.training_state import create_state, get_state_shapes

OPTIMIZER = optax.adam(1e-3)


def init(key):
    return {"w": jax.random.normal(key, (4, 3)), "b": {"bias": jnp.zeros(3)}}


def layouts(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: device, tree)


def test_a_new_state_starts_its_average_at_the_parameters():
    state = create_state(init, OPTIMIZER, jax.random.key(1))
    assert state.step == 0
    assert state.extra == {}
    for path, leaf in flatten(state.params).items():
        np.testing.assert_array_equal(flatten(state.ema)[path], leaf)
    np.testing.assert_array_equal(state.params["w"], init(jax.random.key(1))["w"])
    assert (state.params["w"] != create_state(init, OPTIMIZER, jax.random.key(2)).params["w"]).any()


def test_parameters_and_their_average_are_different_memory():
    # One buffer for both could not be donated to a step.
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    for state in (create_state(init, OPTIMIZER, jax.random.key(1)), init_state(init(jax.random.key(1)), OPTIMIZER)):
        assert state.params["w"].unsafe_buffer_pointer() != state.ema["w"].unsafe_buffer_pointer()
        assert step(state).step == 1


def test_the_average_of_bfloat16_parameters_is_float32():
    state = init_state({"w": jnp.ones(3, jnp.bfloat16)}, OPTIMIZER)
    assert (state.params["w"].dtype, state.ema["w"].dtype) == (jnp.bfloat16, jnp.float32)


def test_shapes_are_those_of_a_new_state():
    for shardings in (None, layouts):
        state = create_state(init, OPTIMIZER, jax.random.key(0), shardings=shardings)
        shapes = get_state_shapes(init, OPTIMIZER, shardings=shardings)
        assert jax.tree.structure(state) == jax.tree.structure(shapes)
        for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
            assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
            assert shardings is None or shape.sharding == leaf.sharding


def test_a_state_is_a_tree_of_arrays_with_paths():
    state = create_state(init, OPTIMIZER, jax.random.key(0))
    paths = flatten(state)
    assert {"step", "params/w", "params/b/bias", "ema/w", "ema/b/bias", "opt_state/0/mu/w"} <= set(paths)
    assert all(isinstance(leaf, jax.Array) for leaf in paths.values())
    assert isinstance(jax.tree.map(lambda leaf: leaf, state), TrainState)
