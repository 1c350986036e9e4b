import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path
from dit_video.nn import (
    Linear,
    LoraConfig,
    add_lora_scale,
    apply_stack,
    attach_lora,
    get_graph_def,
    get_param_shapes,
    init_lora,
    init_params,
    make_stack,
    merge_lora,
    merge_lora_in_place,
)


class Net(nnx.Module):
    """A linear map and a stack of three."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = Linear(4, 6, rngs=rngs)
        self.blocks = make_stack(lambda r: Linear(6, 6, rngs=r), 3, rngs=rngs)

    def __call__(self, x):
        return apply_stack(self.blocks, self.embed(x))


GRAPH, PARAMS = get_graph_def(Net), init_params(Net, rng.key(0, "net"))
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
CONFIG = LoraConfig(rank=2, alpha=3.0, targets=("kernel$",))


@jax.jit
def run(params):
    return nnx.merge(GRAPH, params)(X)


def adapter(seed, config=CONFIG):
    """Return an adapter that changes the model, as after training."""
    fresh = init_lora(PARAMS, config, rng.key(seed, "lora"))
    noise = np.random.default_rng(seed)
    return add_lora_scale(
        map_with_path(lambda _, leaf: leaf + 0.3 * noise.normal(size=leaf.shape), fresh), config.scale
    )


def assert_trees_close(actual, expected, atol):
    assert flatten(actual).keys() == flatten(expected).keys()
    for path, leaf in flatten(expected).items():
        np.testing.assert_allclose(flatten(actual)[path], leaf, atol=atol, err_msg=path)


def test_a_fresh_adapter_has_the_targets_shapes_and_changes_nothing():
    fresh = init_lora(get_param_shapes(Net), CONFIG, rng.key(1, "lora"))
    assert {path: leaf.shape for path, leaf in flatten(fresh).items()} == {
        "embed/kernel/a": (4, 2),
        "embed/kernel/b": (2, 6),
        "blocks/kernel/a": (3, 6, 2),
        "blocks/kernel/b": (3, 2, 6),
    }
    for change in (merge_lora, attach_lora):
        np.testing.assert_array_equal(run(change(PARAMS, add_lora_scale(fresh, 7.0))), run(PARAMS))
    a = np.asarray(init_lora(get_param_shapes(Net), LoraConfig(rank=4000), rng.key(1, "lora"))["blocks"]["kernel"]["a"])
    assert a.std() == pytest.approx((1 / (3 * 6)) ** 0.5, rel=0.02)  # as PEFT's: uniform in 1 / sqrt(i)
    assert len(np.unique(a)) > 0.9 * a.size


def test_merging_an_adapter_adds_it_and_attaching_gives_the_same():
    lora = adapter(2)
    merged = merge_lora(PARAMS, lora, 0.5)
    for layer in range(3):
        change = np.asarray(lora["blocks"]["kernel"]["a"][layer]) @ np.asarray(lora["blocks"]["kernel"]["b"][layer])
        expected = np.asarray(PARAMS["blocks"]["kernel"][layer]) + 0.5 * 3.0 / 2 * change
        np.testing.assert_allclose(merged["blocks"]["kernel"][layer], expected, atol=1e-6)
    assert np.abs(run(merged) - run(PARAMS)).max() > 0.1
    np.testing.assert_allclose(run(attach_lora(PARAMS, lora, 0.5)), run(merged), rtol=1e-5, atol=2e-6)


def test_merging_in_place_reuses_the_memory_of_arrays_on_devices_alone():
    lora = adapter(2)
    lora["embed"]["bias"] = {"diff": np.arange(6.0, dtype=np.float32)}
    expected = merge_lora(PARAMS, lora, 0.5)
    for params in (jax.tree.map(jnp.array, PARAMS), jax.tree.map(np.array, PARAMS)):
        merged = merge_lora_in_place(params, lora, 0.5)
        assert_trees_close(merged, expected, atol=1e-6)
        for path, leaf in flatten(params).items():
            is_changed = path != "blocks/bias"
            assert (flatten(merged)[path] is leaf) != is_changed
            assert not isinstance(leaf, jax.Array) or leaf.is_deleted() == is_changed, path
    np.testing.assert_allclose(merged["embed"]["bias"], PARAMS["embed"]["bias"] + 0.5 * np.arange(6), atol=1e-6)


@pytest.mark.slow
def test_merging_a_stack_needs_the_memory_of_one_layer():
    kernels = {"kernel": jax.ShapeDtypeStruct((16, 128, 128), jnp.float32)}
    factors = {"a": (16, 128, 2), "b": (16, 2, 128), "scale": (16,)}
    lora = {"kernel": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in factors.items()}}
    memory = jax.jit(merge_lora, donate_argnums=0).lower(kernels, lora).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 16 * 128 * 128 * 4
    assert memory.temp_size_in_bytes < 4 * 128 * 128 * 4


def test_two_stacked_adapters_are_their_weighted_sum():
    first, second = adapter(3), adapter(4, LoraConfig(rank=3, alpha=1.0, targets=("blocks/kernel$",)))
    both = merge_lora(merge_lora(PARAMS, first, 0.7), second, -1.3)
    changes = [jax.tree.map(lambda x, y: x - y, merge_lora(PARAMS, one), PARAMS) for one in (first, second)]
    expected = jax.tree.map(lambda p, x, y: p + 0.7 * x - 1.3 * y, PARAMS, *changes)
    assert_trees_close(both, expected, atol=2e-6)
    np.testing.assert_allclose(
        run(attach_lora(attach_lora(PARAMS, first, 0.7), second, -1.3)), run(both), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(run(merge_lora(PARAMS, first, 0.0)), run(PARAMS))


def test_gradients_are_those_of_the_merged_kernels_and_reach_targets_alone():
    config = LoraConfig(rank=2, alpha=3.0, targets=("blocks/kernel$",))
    lora = adapter(5, config)
    factors = {"blocks": {"kernel": {name: lora["blocks"]["kernel"][name] for name in ("a", "b")}}}

    def loss(change):
        return lambda factors: jnp.square(run(change(PARAMS, add_lora_scale(factors, config.scale)))).sum()

    result = jax.grad(loss(attach_lora))(factors)
    assert set(flatten(result)) == {"blocks/kernel/a", "blocks/kernel/b"}
    for path, leaf in flatten(jax.grad(loss(merge_lora))(factors)).items():
        assert np.abs(leaf).max() > 1e-2
        np.testing.assert_allclose(flatten(result)[path], leaf, rtol=1e-4, atol=1e-4 * np.abs(leaf).max())


def test_kernels_keep_their_dtype():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    merged = merge_lora(half, adapter(6))
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("blokcs/kernel",), "'blokcs/kernel' .*blocks/kernel"),
        (("blocks",), r"blocks/bias \[3, 6\] .* use targets that end in kernel\$"),
    ],
)
def test_targets_without_kernels_are_refused(targets, words):
    with pytest.raises(UserError, match=words):
        init_lora(PARAMS, LoraConfig(targets=targets), rng.key(0, "lora"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank=0, .* rank >= 1"),
        ({"alpha": 0.0}, "alpha > 0"),
        ({"targets": ()}, "needs the paths of kernels"),
        ({"alpha": float("inf")}, "finite alpha"),
        ({"targets": ("(",)}, r"targets='\(' is invalid: it must be a regular expression"),
        ({"targets": "blocks/.*kernel$"}, r"targets='blocks.*Use targets=\('blocks/\.\*kernel\$',\)"),
    ],
)
def test_invalid_lora_configs_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        LoraConfig(**changes)


@pytest.mark.parametrize("change", [merge_lora, attach_lora])
def test_an_adapter_of_another_model_is_refused(change):
    lora = adapter(7)
    with pytest.raises(UserError, match=r"embed/kernel; use one of this model"):
        change({"blocks": PARAMS["blocks"]}, lora)
    wide = {**PARAMS, "embed": {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}}
    with pytest.raises(UserError, match=r"embed/kernel .*\[4, 2\] and \[2, 6\].* \[4, 8\]; use an adapter"):
        change(wide, lora)


def test_parts_of_an_adapted_kernel_cannot_be_taken():
    attached = attach_lora(PARAMS, adapter(8))["embed"]["kernel"]
    assert attached[...] is attached
    with pytest.raises(TypeError, match=r"parts of a LowRankKernel cannot be taken"):
        attached[:, :2]


def test_a_part_of_the_model_without_parameters_stays():
    """A frozen text encoder is such a part."""
    for change in (merge_lora, attach_lora):
        whole = change({"net": PARAMS, "text": {}}, {"net": adapter(2)})
        assert whole["text"] == {}
        np.testing.assert_array_equal(run(whole["net"]), run(change(PARAMS, adapter(2))))
