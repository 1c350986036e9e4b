"""The loss with random parameters: a fresh denoiser predicts zero and would meet any identity."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dit_video.core import rng
from dit_video.core.trees import flatten
from dit_video.diffusion import FlowMatching, RectifiedFlow
from dit_video.models.encoders import FrozenTextConfig
from dit_video.nn import Linear, LoraConfig, add_lora_scale, get_graph_def, init_lora, init_params, merge_lora
from dit_video.tokens import Grid, PackedBatch, pack, stack_rows
from dit_video.training.losses.denoiser import LoraLoss, time_quantile
from dit_video.training.state import init_state
from dit_video.training.step import accumulate_gradients, compute_gradients
from support.denoiser_loss import LOSS, PARAMS, SHAPE, TOKENIZE, A, B, C, make_batch, make_example
from support.devices import check_on_eight_devices
from support.training_state import make_step


@jax.jit
def _run(params, rows, step, caption_dropout):
    loss = copy.copy(LOSS)
    object.__setattr__(loss, "caption_dropout", caption_dropout)  # traced, so that one program serves every share
    return jax.value_and_grad(lambda params: loss(params, rows, step)[0])(params)


def run(rows, step=0, caption_dropout=0.5, params=PARAMS):
    """Return the loss and its gradients."""
    return _run(params, rows, jnp.asarray(step), jnp.asarray(caption_dropout))


def mean(values):
    return jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)) / len(leaves), *values)


def assert_close(actual, expected):
    assert actual[0] == pytest.approx(float(expected[0]), rel=1e-5)
    for path, leaf in flatten(actual[1]).items():
        reference = flatten(expected[1])[path]
        assert np.abs(leaf - reference).max() <= 2e-5 * max(np.abs(reference).max(), 0.1), path


def test_an_example_has_the_same_loss_wherever_and_with_whatever_it_is_packed():
    expected = mean(run(make_batch([one], [])) for one in (A, B, C))
    for path, gradient in flatten(expected[1]).items():
        assert np.abs(gradient).max() > 1e-4, f"{path} has no gradient: the comparison would say nothing"
    for rows in (make_batch([A, B], [C]), make_batch([C], [A, B]), make_batch([B, A], [C]), make_batch([C, B, A], [])):
        assert_close(run(rows), expected)


# --- a frozen text encoder: rows hold embeddings --------------------------------------------------------------------

FROZEN = FrozenTextConfig(folder="nowhere", width=8, max_tokens=16)
TABLE = np.random.default_rng(7).normal(size=(300, 8)).astype(np.float32)
FROZEN_LOSS = dataclasses.replace(LOSS, text_encoder=get_graph_def(FROZEN.make), empty_caption=TABLE[TOKENIZE("")])


@jax.jit
def run_frozen(params, rows):
    """Return the loss and its gradients at step 2."""
    return jax.value_and_grad(lambda params: FROZEN_LOSS(params, rows, jnp.asarray(2))[0])(params)


def embedded(*rows) -> PackedBatch:
    packed = (pack([one._replace(text=TABLE[one.text]) for one in row], SHAPE, width=4, text_width=8) for row in rows)
    return stack_rows(packed)


@pytest.mark.nightly
def test_embeddings_have_the_same_loss_wherever_they_are_packed():
    params = {"backbone": PARAMS["backbone"], "text": init_params(FROZEN.make, rng.key(0, "text"))}
    assert params["text"] == {}
    alone = [run_frozen(params, embedded([one], [])) for one in (A, B, C)]
    assert len({round(float(value), 4) for value, _ in alone}) == 3
    for path, gradient in flatten(mean(alone)[1]).items():
        assert np.abs(gradient).max() > 1e-4, f"{path} has no gradient: the comparison would say nothing"
    for rows in (embedded([A, B], [C]), embedded([C], [B, A]), embedded([C, B, A], [])):
        assert_close(run_frozen(params, rows), mean(alone))
    other = A._replace(text=TOKENIZE("dot ball"))
    assert run_frozen(params, embedded([other], []))[0] != alone[0][0]
    # Padding changes nothing.
    rows = embedded([A, B], [C])
    loud = rows._replace(text=np.where(rows.text_segments[..., None] == 0, 30, rows.text).astype(np.float32))
    np.testing.assert_array_equal(run_frozen(params, loud)[0], run_frozen(params, rows)[0])


def test_the_loss_differs_between_examples_and_steps():
    losses = [float(run(make_batch([one], []))[0]) for one in (A, A._replace(example=77), B)]
    assert len({round(loss, 4) for loss in losses}) == 3
    assert run(make_batch([A], []), step=1)[0] != run(make_batch([A], []), step=0)[0]


@pytest.mark.slow
def test_parts_of_a_batch_make_its_gradients_and_figures():
    """The 4 parts have 3, 1, 0 and 2 valid clips, and randomness depends on the example alone."""
    rows = make_batch([A, B, C], [A._replace(example=8)], [B._replace(example=9)], [C, A])
    valid = rows.valid.copy()
    valid[2] = False
    rows, step = rows._replace(valid=valid), jnp.asarray(3)
    output, gradients = jax.jit(functools.partial(accumulate_gradients, LOSS, 4))(PARAMS, rows, step)
    whole, reference = jax.jit(functools.partial(compute_gradients, LOSS))(PARAMS, rows, step)
    (value, (figures, *_)), (expected, (named, *_)) = output, whole
    assert_close((value, gradients), (expected, reference))
    for name, figure in named.items():
        np.testing.assert_allclose(figures[name], figure, rtol=1e-5, err_msg=name)
    bins = [figure for name, figure in figures.items() if name.startswith("loss_t")]
    assert sum(float(one.total) for one in bins) / 6 == pytest.approx(float(value), rel=1e-5)
    assert sum(float(one.number) for one in bins) == pytest.approx(6)
    assert float(figures["masked"].total) == 1


def test_rows_of_padding_do_not_count_and_an_empty_batch_is_zero():
    one = run(make_batch([A], []))
    assert_close(one, mean([run(make_batch([], [A]))]))
    value, gradients = run(make_batch([], []))
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_padding_does_not_change_the_loss_bit_for_bit():
    rows = make_batch([A, B], [C])
    loud = rows._replace(
        tokens=np.where((rows.segments == 0)[..., None], 30, rows.tokens).astype(np.float32),
        layout=dataclasses.replace(
            rows.layout, positions=np.where((rows.segments == 0)[..., None], 7, rows.positions).astype(np.float32)
        ),
        text=np.where(rows.text_segments == 0, 99, rows.text),
        examples=np.where(rows.valid, rows.examples, 12345).astype(np.uint32),
    )
    for left, right in zip(jax.tree.leaves(run(loud)), jax.tree.leaves(run(rows)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_invalid_segments_do_not_count():
    rows = make_batch([A, B], [C])
    valid = rows.valid.copy()
    valid[0, 1] = False
    assert_close(run(rows._replace(valid=valid)), mean(run(make_batch([one], [])) for one in (A, C)))


def test_a_dropped_caption_is_the_empty_one():
    silent = [one._replace(text=TOKENIZE("")) for one in (A, B, C)]
    assert_close(
        run(make_batch([A, B], [C]), caption_dropout=1.0), run(make_batch(silent[:2], silent[2:]), caption_dropout=0.0)
    )


def test_captions_are_dropped_independently_with_their_probability():
    dropped = []
    for step in range(12):
        for one in (A, B):
            rows = make_batch([one], [])
            kept, silent, result = (float(run(rows, step, share)[0]) for share in (0.0, 1.0, 0.5))
            assert result in (kept, silent)
            assert kept != silent
            dropped.append(result == silent)
    assert 6 <= sum(dropped) <= 18
    assert dropped[0::2] != dropped[1::2]


# --- randomness -----------------------------------------------------------------------------------------------------


def get_noise(rows: PackedBatch, step: int = 0):
    """Return the noise of each example."""
    keys = rng.example_keys(rng.key(3, "noise"), step, rows.examples)
    noise = np.asarray(jax.jit(lambda rows, keys: rows.layout.sample_noise(keys, rows.tokens.shape[-1]))(rows, keys))
    return {
        int(rows.examples[row, index]): noise[row][rows.segments[row] == index + 1]
        for row, index in zip(*np.nonzero(rows.valid), strict=True)
    }


def test_noise_is_a_function_of_the_example_and_the_step():
    expected = get_noise(make_batch([A, B], [C]))
    assert {example: values.shape for example, values in expected.items()} == {5: (8, 4), 6: (6, 4), 2**32 - 1: (4, 4)}
    for rows in (make_batch([C], [B, A]), make_batch([B], [C, A])):
        for example, values in get_noise(rows).items():
            np.testing.assert_array_equal(values, expected[example])
    for example, values in get_noise(make_batch([A, B], [C]), step=1).items():
        assert (values != expected[example]).all()


@pytest.mark.nightly
def test_noise_values_are_distinct_and_normal():
    rows = make_batch([A, A._replace(example=9)], [A._replace(example=10), B])
    steps = [np.concatenate(list(get_noise(rows, step).values())) for step in range(20)]
    values = np.concatenate(steps).reshape(-1)
    assert len(np.unique(values)) == len(values) == 20 * 30 * 4
    assert values.mean() == pytest.approx(0, abs=0.06)
    assert values.std() == pytest.approx(1, abs=0.05)


def test_times_belong_to_examples_cover_the_batch_and_move_with_the_step():
    times = jax.jit(LOSS.draw_times)
    there, here = times(make_batch([A, B], [C]), jnp.asarray(4)), times(make_batch([C], [B, A]), jnp.asarray(4))
    np.testing.assert_array_equal([there[0, 0], there[0, 1], there[1, 0]], [here[1, 1], here[1, 0], here[0, 0]])
    rows = make_batch([], [])
    rows = rows._replace(examples=np.arange(6, dtype=np.uint32).reshape(2, 3))
    six = np.sort(np.asarray(times(rows, jnp.asarray(4))).reshape(-1))
    # A third of logit-normal times is in each interval; independent draws would often leave two empty.
    assert [((six >= low) & (six < high)).sum() for low, high in ((0, 0.394), (0.394, 0.606), (0.606, 1))] == [2, 2, 2]
    assert (
        np.asarray(times(rows, jnp.asarray(5))).reshape(-1) != np.asarray(times(rows, jnp.asarray(4))).reshape(-1)
    ).all()


@pytest.mark.slow
def test_eight_devices_have_the_losses_of_one():
    check_on_eight_devices("denoiser_losses.py")


@pytest.mark.slow
def test_a_model_of_one_interval_of_times_is_trained_in_it_alone():
    objective = FlowMatching(process=RectifiedFlow(shift=3.0))
    share = time_quantile(objective, 0.6)
    assert float(objective.compute_time(jnp.float32(share))) == pytest.approx(0.6, abs=1e-5)
    rows = make_batch(*([make_example(Grid(1, 2, 2), "a dot", number)] for number in range(64)))
    both = {
        shares: dataclasses.replace(LOSS, objective=objective, time_quantiles=shares).draw_times(rows, jnp.asarray(3))[
            :, 0
        ]
        for shares in ((0.0, 1.0), (0.0, share), (share, 1.0))
    }
    every, low, high = both.values()
    assert low.max() <= 0.6 + 1e-5
    assert high.min() >= 0.6 - 1e-5
    assert float((every < 0.6).mean()) == pytest.approx(share, abs=0.05)
    np.testing.assert_allclose(jnp.sort(low)[32], objective.compute_time(jnp.float32(share / 2)), atol=0.02)


CONFIG = LoraConfig(rank=2, alpha=4.0, targets=("kernel$",))
GRAPH = get_graph_def(lambda rngs: Linear(6, 5, rngs=rngs))
BASE = init_params(lambda rngs: Linear(6, 5, rngs=rngs), rng.key(0, "base"))
NOISE = np.random.default_rng(0)
X = jnp.asarray(NOISE.normal(size=(64, 6)), jnp.float32)
CHANGE = NOISE.normal(size=(6, 1)) @ NOISE.normal(size=(1, 5))
TARGET = nnx.merge(GRAPH, BASE)(X) + X @ jnp.asarray(CHANGE, jnp.float32)
"""Targets that a change of rank 1 explains."""


def loss(params, x, step, weight):
    error = nnx.merge(GRAPH, params)(x) - TARGET
    return weight * jnp.square(error).mean(axis=(0, 1)), {}


ADAPTED = LoraLoss(loss=loss, scale=CONFIG.scale)
OPTIMIZER = optax.adam(3e-2)


def fresh():
    return init_lora(BASE, CONFIG, rng.key(0, "lora"))


def train(steps):
    weight = jnp.ones(())
    step = make_step(ADAPTED, OPTIMIZER, ema_decay=0.0, constants=(weight, BASE))
    state, losses = init_state(fresh(), OPTIMIZER), []
    for _ in range(steps):
        state, figures = step(state, X)
        losses.append(float(figures["loss"]))
    return state, losses


def test_adapter_training_starts_at_the_models_loss_and_finds_a_low_rank_change():
    state, losses = train(300)
    assert losses[0] == pytest.approx(float(loss(BASE, X, 0, 1.0)[0]), rel=1e-6)
    assert losses[-1] < 1e-3 * losses[0]
    assert set(flatten(state.params)) == {"kernel/a", "kernel/b"}
    merged = merge_lora(BASE, add_lora_scale(state.ema, CONFIG.scale))
    np.testing.assert_allclose(merged["kernel"] - BASE["kernel"], CHANGE, atol=0.1)
    np.testing.assert_array_equal(merged["bias"], BASE["bias"])


def test_adapter_gradients_are_those_of_the_merged_model():
    factors = jax.tree.map(lambda leaf: leaf + 0.1, fresh())
    result = jax.grad(lambda f: ADAPTED(f, X, jnp.zeros((), jnp.int32), 1.0, BASE)[0])(factors)
    expected = jax.grad(lambda f: loss(merge_lora(BASE, add_lora_scale(f, CONFIG.scale)), X, 0, 1.0)[0])(factors)
    for path, leaf in flatten(expected).items():
        assert np.abs(leaf).max() > 1e-3
        np.testing.assert_allclose(flatten(result)[path], leaf, rtol=1e-4, atol=1e-6)
