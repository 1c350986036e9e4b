import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.trees import flatten, map_with_path
from dit_video.training.optim.optimizer import (
    Adafactor,
    AdamW,
    Muon,
    OptimizerConfig,
    ScheduleFreeAdamW,
    freeze,
    get_schedule_free_average,
)
from dit_video.training.optim.schedules import Constant, Cosine, WarmupStableDecay

OPTIMIZERS = [AdamW, Adafactor, Muon, ScheduleFreeAdamW]

DRAW = np.random.default_rng(0)
SHAPES = {
    "embed/kernel": (6, 8),
    "blocks/qkv/kernel": (2, 8, 24),
    "blocks/qkv/bias": (2, 24),
    "blocks/table": (2, 6, 8),
    "text/blocks/up/kernel": (1, 8, 16),
    "plain/blocks/up/kernel": (8, 16),
    "head/kernel": (8, 4),
}


def tree(leaves):
    result = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return result


def normal():
    return tree({path: jnp.asarray(DRAW.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()})


PARAMS, GRADIENTS = normal(), normal()


@functools.cache
def program(config):
    optimizer = config.make(steps=1000) if isinstance(config, OptimizerConfig) else config

    @jax.jit
    def run(gradients, params):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
        return updates

    return run


def compute_updates(config, gradients=(GRADIENTS,), params=PARAMS):
    """Return the update of the last of these gradients, by path; `config` may be an optimizer."""
    return flatten(program(config)(tuple(gradients), params))


# --- learning rates -------------------------------------------------------------------------------------------------


def rates(steps, schedule):
    schedule = AdamW(learning_rate=1.0, schedule=schedule).make_schedule(steps=steps)
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps + 1)))


@pytest.mark.parametrize("kind", [Constant, Cosine, WarmupStableDecay])
def test_warmup_is_linear_and_its_first_step_is_not_lost(kind):
    result = rates(100, kind(warmup=10))
    np.testing.assert_allclose(result[[0, 5, 10]], [0.1, 0.55, 1.0], rtol=1e-5)
    assert result.max() == pytest.approx(1)
    assert rates(100, kind(warmup=0))[0] == pytest.approx(1)


def test_schedules_have_their_values_at_key_steps():
    assert (rates(100, Constant(warmup=10))[10:] == 1).all()
    cosine = rates(110, Cosine(warmup=10))
    np.testing.assert_allclose(cosine[[10, 60, 110]], [1, 0.5, 0], atol=1e-6)
    wsd = rates(100, WarmupStableDecay(warmup=10))
    np.testing.assert_allclose(wsd[[10, 79, 80, 90, 99, 100]], [1, 1, 1, 0.5, 0.05, 0], atol=1e-6)


def test_a_long_warmup_leaves_the_rest_to_the_decay():
    result = rates(100, WarmupStableDecay(warmup=90))
    np.testing.assert_allclose(result[[0, 90, 95, 100]], [1 / 90, 1, 0.5, 0], atol=1e-6)


def test_a_run_no_longer_than_its_warmup_is_refused():
    with pytest.raises(UserError, match="warmup=100 is invalid: it must be below steps=100"):
        AdamW().make_schedule(steps=100)
    with pytest.raises(UserError, match="Use a shorter warmup"):
        AdamW(schedule=Constant(warmup=7)).make(steps=5)


# --- updates --------------------------------------------------------------------------------------------------------


def test_adamw_is_that_of_optax():
    config = AdamW(learning_rate=0.01, schedule=Constant(warmup=0), weight_decay=0.1, max_grad_norm=1e9)
    kernels = map_with_path(lambda path, _: path.endswith("kernel"), PARAMS)
    reference = optax.adamw(0.01, b1=0.9, b2=0.99, weight_decay=0.1, mask=kernels)
    expected, result = compute_updates(reference, [GRADIENTS, PARAMS]), compute_updates(config, [GRADIENTS, PARAMS])
    for path in SHAPES:
        np.testing.assert_allclose(result[path], expected[path], rtol=1e-5, atol=1e-8)


def test_gradients_are_clipped_by_their_global_norm():
    config = AdamW(learning_rate=0.01, schedule=Constant(warmup=0), max_grad_norm=0.5)
    params, gradients = (jax.tree.map(np.asarray, tree) for tree in (PARAMS, GRADIENTS))
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
    small = jax.tree.map(lambda leaf: leaf * 0.1 / norm, params)
    clipped = jax.tree.map(lambda leaf: leaf * 0.5 / norm, gradients)
    huge = jax.tree.map(lambda leaf: leaf * 1e4, gradients)
    result, expected = compute_updates(config, [small, huge]), compute_updates(config, [small, clipped])
    unclipped = compute_updates(
        AdamW(learning_rate=0.01, schedule=Constant(warmup=0), max_grad_norm=1e9), [small, huge]
    )
    for path in SHAPES:
        np.testing.assert_allclose(result[path], expected[path], rtol=1e-4, atol=1e-7)
        assert np.abs(result[path] - unclipped[path]).max() > 1e-4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weight_decay_is_that_of_kernels(kind):
    options = {"learning_rate": 0.01, "schedule": Constant(warmup=0), "max_grad_norm": 1e9}
    decayed, plain, everything, biases = (
        compute_updates(kind(**options, **decay))
        for decay in (
            {"weight_decay": 0.1},
            {},
            {"weight_decay": 0.1, "weight_decay_patterns": ("",)},
            {"weight_decay": 0.1, "weight_decay_patterns": ("bias$",)},
        )
    )
    params = flatten(PARAMS)
    for path in SHAPES:
        expected = plain[path] - 0.01 * 0.1 * params[path]
        np.testing.assert_allclose(everything[path], expected, rtol=1e-4, atol=1e-7, err_msg=path)
        for result, suffix in ((decayed, "kernel"), (biases, "bias")):
            expected = (everything if path.endswith(suffix) else plain)[path]
            np.testing.assert_allclose(result[path], expected, rtol=1e-5, atol=1e-8, err_msg=path)


def test_factors_of_adapters_decay():
    params = {"out": {"kernel": {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}, "bias": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    result = compute_updates(AdamW(schedule=Constant(warmup=0), weight_decay=0.1), (zeros,), params)
    assert {path for path, update in result.items() if update.any()} == {"out/kernel/a", "out/kernel/b"}


def test_the_arrays_of_the_state_have_the_paths_of_optax_so_that_older_checkpoints_are_read():
    config = AdamW(schedule=Constant(warmup=0), weight_decay=0.1, max_grad_norm=1e9)
    reference = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(lambda _: 0.01, weight_decay=0.1))
    state, expected = config.make(steps=1000).init(PARAMS), reference.init(PARAMS)
    assert flatten(state).keys() == flatten(expected).keys()


MUON = Muon(learning_rate=0.01, schedule=Constant(warmup=0), max_grad_norm=1e9)
MATRICES = ["blocks/qkv/kernel", "text/blocks/up/kernel", "plain/blocks/up/kernel"]


def test_muon_orthogonalises_the_matrices_of_the_blocks_and_nothing_else():
    result = compute_updates(MUON)
    for path in (path for path in SHAPES if path.endswith("kernel")):
        for layer in result[path].reshape(-1, *result[path].shape[-2:]):
            singular = np.linalg.svd(layer, compute_uv=False)
            assert (singular.min() > 0.5 * singular.max()) == (path in MATRICES), (path, singular)
    reference = optax.adamw(0.01, b1=0.9, b2=0.99, weight_decay=0.0, nesterov=True)
    expected = compute_updates(reference)
    for path in SHAPES.keys() - set(MATRICES):
        np.testing.assert_allclose(result[path], expected[path], rtol=1e-4)


def test_muon_updates_have_the_size_of_adamw_updates():
    result = compute_updates(MUON)
    for path in MATRICES:
        # An orthogonal m x n update times 0.2 sqrt(max(m, n)): root mean square 0.2, of singular values of about one.
        assert np.sqrt(np.square(result[path]).mean()) == pytest.approx(0.2 * 0.01, rel=0.25)


def test_layers_of_a_stack_are_orthogonalised_one_by_one():
    stacked = compute_updates(MUON)["blocks/qkv/kernel"]
    for layer in range(2):
        params, gradients = (
            tree({"blocks/qkv/kernel": x["blocks"]["qkv"]["kernel"][layer]}) for x in (PARAMS, GRADIENTS)
        )
        alone = compute_updates(MUON, [gradients], params)["blocks/qkv/kernel"]
        np.testing.assert_allclose(stacked[layer], alone, rtol=1e-3, atol=1e-6)


def test_muon_takes_a_convolution_for_the_matrix_from_what_it_sees():
    gradient = np.random.default_rng(0).normal(size=(3, 2, 2, 4, 6)).astype(np.float32)
    result = compute_updates(MUON, [tree({"conv/kernel": gradient})], tree({"conv/kernel": np.zeros_like(gradient)}))
    matrix = np.asarray(result["conv/kernel"]).reshape(-1, 6)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert singular.min() > 0.5 * singular.max()
    left, _, right = np.linalg.svd(gradient.reshape(-1, 6), full_matrices=False)
    cosine = -(matrix * (left @ right)).sum() / np.linalg.norm(matrix) / np.linalg.norm(left @ right)
    assert cosine > 0.95  # five iterations approach the nearest orthogonal matrix


def test_muon_patterns_choose_the_orthogonalised_matrices():
    chosen = compute_updates(dataclasses.replace(MUON, patterns=("qkv",)))
    plain, usual = compute_updates(dataclasses.replace(MUON, patterns=())), compute_updates(MUON)
    for path in MATRICES:
        expected = usual if "qkv" in path else plain
        np.testing.assert_allclose(chosen[path], expected[path], rtol=1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_factors_scale_the_updates_of_the_paths_that_match(kind):
    factors = {"^text/": 0.5, "kernel$": 0.1}
    plain = kind(learning_rate=0.01, schedule=Constant(warmup=0), weight_decay=0.1)
    usual, scaled = compute_updates(plain), compute_updates(dataclasses.replace(plain, rate_factors=factors))
    expected = {"text/blocks/up/kernel": 0.05, "blocks/qkv/bias": 1.0, "blocks/table": 1.0}
    for path in SHAPES:
        np.testing.assert_allclose(scaled[path], expected.get(path, 0.1) * usual[path], rtol=1e-4, atol=5e-7)


def test_an_optimizer_of_another_package_is_any_transformation_of_optax():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Lion(OptimizerConfig):
        b1: float = 0.9

        def make_main(self, rates, *, mesh):
            return optax.chain(optax.scale_by_lion(b1=self.b1), *self.decay_and_scale(rates))

    config = Lion(learning_rate=0.01, schedule=Constant(warmup=0), max_grad_norm=1e9, frozen=("^head",))
    expected = compute_updates(optax.lion(0.01, b1=0.9, weight_decay=0.0))
    for path, update in compute_updates(config).items():
        np.testing.assert_allclose(update, 0 if path == "head/kernel" else expected[path], rtol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_paths_do_not_move_and_the_others_do(kind):
    config = kind(schedule=Constant(warmup=0), weight_decay=0.1, frozen=("^text/", "qkv/bias$"))
    for path, update in compute_updates(config).items():
        assert bool(update.any()) == (path not in ("text/blocks/up/kernel", "blocks/qkv/bias")), path


def test_frozen_gradients_do_not_count_in_the_clipped_norm():
    config = AdamW(learning_rate=0.01, schedule=Constant(warmup=0), max_grad_norm=0.5, frozen=("^text/",))
    loud = map_with_path(lambda path, leaf: leaf * 1e4 if path.startswith("text") else leaf, GRADIENTS)
    result, expected = compute_updates(config, [PARAMS, loud]), compute_updates(config, [PARAMS, GRADIENTS])
    for path in SHAPES:
        np.testing.assert_array_equal(result[path], expected[path])


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_only_trainable_paths_move(kind):
    config = kind(schedule=Constant(warmup=0), weight_decay=0.1, trainable=("qkv/", "^head"), frozen=("bias$",))
    for path, update in compute_updates(config).items():
        assert bool(update.any()) == (path in ("blocks/qkv/kernel", "head/kernel")), path
    state = config.make(steps=1000).init(PARAMS)
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    trained = 2 * 8 * 24 + 8 * 4
    # Two moments of AdamW, one of Muon's matrix; and counters.
    assert size - (2 * trained if kind is AdamW else trained + 8 * 4) in range(8)


def test_adafactor_is_the_published_one_and_keeps_little():
    config = Adafactor(learning_rate=0.01, schedule=Constant(warmup=0), max_grad_norm=1e9)
    draw = np.random.default_rng(3)
    params = {"kernel": jnp.asarray(draw.normal(size=(2, 160, 256)), jnp.float32), "bias": jnp.ones(256)}
    ours, theirs = (
        config.make(steps=100),
        optax.adafactor(0.01, multiply_by_parameter_scale=False, clipping_threshold=1.0),
    )
    states = [one.init(params) for one in (ours, theirs)]
    # The state holds means of rows and columns for a stack of matrices.
    assert sum(leaf.size for leaf in jax.tree.leaves(states[0])) < 2 * (160 + 256) + 256 + 20
    for _ in range(3):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), params)
        updates = []
        for index, one in enumerate((ours, theirs)):
            result, states[index] = one.update(gradients, states[index], params)
            updates.append(result)
        for name in params:
            np.testing.assert_allclose(updates[0][name], updates[1][name], rtol=1e-5, atol=1e-8)


def test_an_average_of_the_optimizer_leaves_what_is_frozen():
    optimizer = ScheduleFreeAdamW(schedule=Constant(warmup=0), frozen=("still",)).make(steps=10)
    params = {"still": jnp.asarray([-0.0, jnp.pi]), "w": jnp.ones(3)}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    average = get_schedule_free_average(params, state)
    assert average is not None
    assert np.asarray(average["still"]).tobytes() == np.asarray([-0.0, np.pi], np.float32).tobytes()
    assert (average["w"] > params["w"]).all()
    assert get_schedule_free_average(params, AdamW().make(steps=1000).init(params)) is None


def test_frozen_parameters_keep_every_bit():
    optimizer = AdamW(schedule=Constant(warmup=0), trainable=("w",)).make(steps=1000)
    params = {"still": jnp.asarray([-0.0, 0.0, 1e-30, jnp.pi]), "w": jnp.ones(1)}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert np.asarray(after["still"]).tobytes() == np.asarray(params["still"]).tobytes()
    assert after["w"] != params["w"]


def test_frozen_parameters_get_no_gradient():
    config = AdamW(trainable=("w",))
    gradient = jax.grad(lambda params: sum(x.sum() for x in freeze(config, params).values()))
    result = gradient({"still": jnp.ones(2), "w": jnp.ones(2)})
    np.testing.assert_array_equal(result["still"], 0)
    np.testing.assert_array_equal(result["w"], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": ("^txet/",)}, r"frozen='\^txet/' is invalid: it matches no parameter. Use the path of one: text"),
        (
            {"trainable": ("text/block/",)},
            r"trainable='text/block/' is invalid: it matches no parameter. Use the path of one: text/blocks,",
        ),
        ({"rate_factors": {"^txet/": 0.1}}, r"rate_factors='\^txet/' is invalid: .* Use the path of one: text"),
        ({"patterns": ("block$",)}, r"patterns='block\$' is invalid: .* Use the path of one"),
        ({"weight_decay": 0.1, "weight_decay_patterns": ("kernal",)}, "weight_decay_patterns='kernal' is invalid"),
    ],
)
def test_a_pattern_without_matching_parameters_is_refused(options, message):
    with pytest.raises(UserError, match=message) as error:
        Muon(**options).make(steps=1000).init(PARAMS)
    assert "\n" not in str(error.value)


def test_tiny_updates_of_float32_parameters_do_not_vanish():
    optimizer = AdamW(learning_rate=1e-5, schedule=Constant(warmup=0)).make(steps=1000)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update({"w": jnp.ones(3)}, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.full(3, 1.0)}
    state = optimizer.init(params)
    for _ in range(20):
        params, state = step(params, state)
    assert params["w"].dtype == jnp.float32
    np.testing.assert_allclose(params["w"], 1 - 20e-5, atol=2e-6)


# --- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"rate_factors": {"^text/": -0.1}}, "the factor of '\\^text/' must not be negative"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"rate_factors": {"^text/": float("inf")}}, "'\\^text/': inf.* be finite"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"trainable": ("(",)}, r"trainable='\(' is invalid: it must be a regular expression"),
        pytest.param(
            {"weight_decay_patterns": (3,)},
            "weight_decay_patterns=3 is invalid: it must be a regular expression",
            marks=pytest.mark.wrong_types,
        ),
        ({"b1": 1.0}, r"b1=1.0.*they must lie in \[0, 1\)"),
        ({"b2": -0.1}, "b2=-0.1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"schedule": Cosine()}, r"Use Constant\(...\) and a positive b1"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ScheduleFreeAdamW(**options)


@pytest.mark.parametrize("field", ["trainable", "frozen", "weight_decay_patterns", "patterns"])
def test_a_string_in_place_of_a_tuple_of_patterns_is_refused(field):
    with pytest.raises(UserError, match=rf"{field}='\^text/' is invalid: .*Use {field}=\('\^text/',\)"):
        Muon(**{field: "^text/"})


def test_schedules_out_of_range_are_refused():
    with pytest.raises(UserError, match="warmup=-1"):
        Constant(warmup=-1)
    with pytest.raises(UserError, match=r"decay=0.0 is invalid: it must lie in \(0, 1\]"):
        WarmupStableDecay(decay=0.0)


def test_a_config_comes_back_from_json():
    config = Muon(frozen=("^text/",))
    assert config_json.from_json(config_json.to_json(config)) == config
