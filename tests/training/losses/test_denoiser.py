"""The loss from random parameters: of a fresh denoiser, which predicts zero, no identity says anything."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.backbones.dit import DitConfig
from dit_video.core import rng
from dit_video.core.trees import flatten
from dit_video.diffusion import FlowMatching, RectifiedFlow
from dit_video.nn import get_graph_def, init_params
from dit_video.text import ByteEncoderConfig, FrozenTextConfig
from dit_video.tokens import Grid, PackedBatch, PackedExample, PackedShape, compute_positions, pack, sample_packed_noise
from dit_video.training.losses.denoiser import DenoiserLoss, time_quantile
from dit_video.training.step import accumulate_gradients
from support.devices import check_on_eight_devices
from support.rough import rough_params

TEXT = ByteEncoderConfig(width=8, layers=1, heads=1, max_tokens=16)
DIT = DitConfig(channels=1, context_width=8, patch=Grid(1, 2, 2), width=12, layers=1, heads=1, mlp_ratio=2.0)
TOKENIZE = TEXT.make_tokenizer()
SHAPE = PackedShape(tokens=20, text=28, segments=3)
LOSS = DenoiserLoss(
    dit=get_graph_def(DIT.make),
    text=get_graph_def(TEXT.make),
    objective=FlowMatching(),
    caption_dropout=0.5,
    empty_caption=TOKENIZE(""),
    seed=3,
)


PARAMS = {"dit": rough_params(DIT.make), "text": rough_params(TEXT.make)}


def item(grid: Grid, caption: str, example: int) -> PackedExample:
    tokens = np.random.default_rng(example).normal(size=(grid.volume, 4)).astype(np.float32)
    return PackedExample(tokens, compute_positions(grid), TOKENIZE(caption), example)


A, B, C = item(Grid(2, 2, 2), "red ball", 5), item(Grid(1, 2, 3), "box", 6), item(Grid(1, 1, 4), "a dot", 2**32 - 1)


def batch(*rows) -> PackedBatch:
    return PackedBatch(*map(np.stack, zip(*(pack(row, SHAPE, width=4) for row in rows), strict=True)))


@jax.jit
def _run(params, rows, step, caption_dropout):
    loss = copy.copy(LOSS)
    object.__setattr__(loss, "caption_dropout", caption_dropout)  # traced, so that one program serves every share
    return jax.value_and_grad(lambda params: loss(params, rows, step)[0])(params)


def run(rows, step=0, caption_dropout=0.5, params=PARAMS):
    """The loss and its gradients."""
    return _run(params, rows, jnp.asarray(step), jnp.asarray(caption_dropout))


def mean(values):
    return jax.tree.map(lambda *leaves: sum(map(np.asarray, leaves)) / len(leaves), *values)


def assert_close(found, expected):
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-5)
    for path, leaf in flatten(found[1]).items():
        reference = flatten(expected[1])[path]
        assert np.abs(leaf - reference).max() <= 2e-5 * max(np.abs(reference).max(), 0.1), path


def test_an_example_has_the_same_loss_wherever_and_with_whatever_it_is_packed():
    expected = mean(run(batch([one], [])) for one in (A, B, C))
    for path, gradient in flatten(expected[1]).items():
        assert np.abs(gradient).max() > 1e-4, f"{path} has no gradient: the comparison would say nothing"
    for rows in (batch([A, B], [C]), batch([C], [A, B]), batch([B, A], [C]), batch([C, B, A], [])):
        assert_close(run(rows), expected)


# --- a frozen text encoder: rows hold embeddings --------------------------------------------------------------------

FROZEN = FrozenTextConfig(folder="nowhere", width=8, max_tokens=16)
TABLE = np.random.default_rng(7).normal(size=(300, 8)).astype(np.float32)
FROZEN_LOSS = dataclasses.replace(LOSS, text=get_graph_def(FROZEN.make), empty_caption=TABLE[TOKENIZE("")])


@jax.jit
def run_frozen(params, rows):
    """The loss and its gradients, at step 2."""
    return jax.value_and_grad(lambda params: FROZEN_LOSS(params, rows, jnp.asarray(2))[0])(params)


def embedded(*rows) -> PackedBatch:
    packed = (pack([one._replace(text=TABLE[one.text]) for one in row], SHAPE, width=4, text_width=8) for row in rows)
    return PackedBatch(*map(np.stack, zip(*packed, strict=True)))


def test_embeddings_have_the_same_loss_wherever_they_are_packed():
    params = {"dit": PARAMS["dit"], "text": init_params(FROZEN.make, rng.key(0, "text"))}
    assert params["text"] == {}
    alone = [run_frozen(params, embedded([one], [])) for one in (A, B, C)]
    assert len({round(float(value), 4) for value, _ in alone}) == 3
    for path, gradient in flatten(mean(alone)[1]).items():
        assert np.abs(gradient).max() > 1e-4, f"{path} has no gradient: the comparison would say nothing"
    for rows in (embedded([A, B], [C]), embedded([C], [B, A]), embedded([C, B, A], [])):
        assert_close(run_frozen(params, rows), mean(alone))
    other = A._replace(text=TOKENIZE("dot ball"))
    assert run_frozen(params, embedded([other], []))[0] != alone[0][0]
    # What is padding says nothing.
    rows = embedded([A, B], [C])
    loud = rows._replace(text=np.where(rows.text_segments[..., None] == 0, 30, rows.text).astype(np.float32))
    np.testing.assert_array_equal(run_frozen(params, loud)[0], run_frozen(params, rows)[0])


def test_examples_are_told_apart():
    losses = [float(run(batch([one], []))[0]) for one in (A, A._replace(example=77), B)]
    assert len({round(loss, 4) for loss in losses}) == 3
    assert run(batch([A], []), step=1)[0] != run(batch([A], []), step=0)[0]


def test_parts_of_a_batch_make_its_gradients_and_figures():
    """4 parts of 3, 1, 0 and 2 clips that count; what is random of an example is the same in each."""
    rows = batch([A, B, C], [A._replace(example=8)], [B._replace(example=9)], [C, A])
    valid = rows.valid.copy()
    valid[2] = False
    rows, step = rows._replace(valid=valid), jnp.asarray(3)
    value, figures, gradients = jax.jit(functools.partial(accumulate_gradients, LOSS, 4))(PARAMS, rows, step)
    whole = jax.jit(jax.value_and_grad(LOSS, has_aux=True))
    (expected, named), reference = whole(PARAMS, rows, step)
    assert_close((value, gradients), (expected, reference))
    for name, figure in named.items():
        np.testing.assert_allclose(figures[name], figure, rtol=1e-5, err_msg=name)
    bins = [figure for name, figure in figures.items() if name.startswith("loss_t")]
    assert sum(float(one.total) for one in bins) / 6 == pytest.approx(float(value), rel=1e-5)
    assert sum(float(one.number) for one in bins) == pytest.approx(6)
    assert float(figures["masked"].total) == 1


def test_rows_of_padding_and_a_batch_without_examples():
    one = run(batch([A], []))
    assert_close(one, mean([run(batch([], [A]))]))
    value, gradients = run(batch([], []))
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_padding_says_nothing_bit_for_bit():
    rows = batch([A, B], [C])
    loud = rows._replace(
        tokens=np.where((rows.segments == 0)[..., None], 30, rows.tokens).astype(np.float32),
        positions=np.where((rows.segments == 0)[..., None], 7, rows.positions).astype(np.float32),
        text=np.where(rows.text_segments == 0, 99, rows.text),
        examples=np.where(rows.valid, rows.examples, 12345).astype(np.uint32),
    )
    for left, right in zip(jax.tree.leaves(run(loud)), jax.tree.leaves(run(rows)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_what_is_not_valid_does_not_count():
    rows = batch([A, B], [C])
    valid = rows.valid.copy()
    valid[0, 1] = False
    assert_close(run(rows._replace(valid=valid)), mean(run(batch([one], [])) for one in (A, C)))


def test_a_dropped_caption_is_the_empty_one():
    silent = [one._replace(text=TOKENIZE("")) for one in (A, B, C)]
    assert_close(run(batch([A, B], [C]), caption_dropout=1.0), run(batch(silent[:2], silent[2:]), caption_dropout=0.0))


def test_captions_are_dropped_as_often_as_asked_and_apart_from_each_other():
    dropped = []
    for step in range(12):
        for one in (A, B):
            rows = batch([one], [])
            kept, silent, found = (float(run(rows, step, share)[0]) for share in (0.0, 1.0, 0.5))
            assert found in (kept, silent)
            assert kept != silent
            dropped.append(found == silent)
    assert 6 <= sum(dropped) <= 18
    assert dropped[0::2] != dropped[1::2]


# --- randomness -----------------------------------------------------------------------------------------------------


def noise_of(rows: PackedBatch, step: int = 0):
    """By example, its noise."""
    keys = rng.example_keys(rng.key(3, "noise"), step, rows.examples)
    noise = np.asarray(jax.jit(sample_packed_noise)(rows, keys))
    return {
        int(rows.examples[row, index]): noise[row][rows.segments[row] == index + 1]
        for row, index in zip(*np.nonzero(rows.valid), strict=True)
    }


def test_noise_is_a_function_of_the_example_and_the_step():
    expected = noise_of(batch([A, B], [C]))
    assert {example: values.shape for example, values in expected.items()} == {5: (8, 4), 6: (6, 4), 2**32 - 1: (4, 4)}
    for rows in (batch([C], [B, A]), batch([B], [C, A])):
        for example, values in noise_of(rows).items():
            np.testing.assert_array_equal(values, expected[example])
    for example, values in noise_of(batch([A, B], [C]), step=1).items():
        assert (values != expected[example]).all()


def test_no_two_values_of_noise_are_the_same_and_they_are_normal():
    rows = batch([A, A._replace(example=9)], [A._replace(example=10), B])
    steps = [np.concatenate(list(noise_of(rows, step).values())) for step in range(20)]
    values = np.concatenate(steps).reshape(-1)
    assert len(np.unique(values)) == len(values) == 20 * 30 * 4
    assert values.mean() == pytest.approx(0, abs=0.06)
    assert values.std() == pytest.approx(1, abs=0.05)


def test_times_belong_to_examples_cover_the_batch_and_move_with_the_step():
    times = jax.jit(LOSS.draw_times)
    there, here = times(batch([A, B], [C]), jnp.asarray(4)), times(batch([C], [B, A]), jnp.asarray(4))
    np.testing.assert_array_equal([there[0, 0], there[0, 1], there[1, 0]], [here[1, 1], here[1, 0], here[0, 0]])
    rows = batch([], [])
    rows = rows._replace(examples=np.arange(6, dtype=np.uint32).reshape(2, 3))
    six = np.sort(np.asarray(times(rows, jnp.asarray(4))).reshape(-1))
    # Of logit-normal times a third lies in each of these intervals; of independent draws two would often be empty.
    assert [((six >= low) & (six < high)).sum() for low, high in ((0, 0.394), (0.394, 0.606), (0.606, 1))] == [2, 2, 2]
    assert (
        np.asarray(times(rows, jnp.asarray(5))).reshape(-1) != np.asarray(times(rows, jnp.asarray(4))).reshape(-1)
    ).all()


# --- many devices ---------------------------------------------------------------------------------------------------

ON_EIGHT_DEVICES = """
    import importlib.util, sys
    import jax, jax.numpy as jnp, numpy as np

    spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    from dit_video.distributed import MeshConfig, ShardingRules, make_mesh, shard_batch, shardings
    from dit_video.training.optim.optimizer import OptimizerConfig, make_optimizer
    from dit_video.training.state import new_state
    from dit_video.training.step import make_step

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup=0), steps=10)
    step = make_step(shared.LOSS, optimizer, ema_decay=0.9)
    sizes = [shared.A, shared.B, shared.C]

    def rows(start):
        items = [sizes[index % 3]._replace(example=start + index) for index in range(13)]
        return shared.batch(items[:2], items[2:4], items[4:5], [], items[5:8], items[8:9], items[9:11], items[11:13])

    def losses(mesh):
        layout = lambda tree: shardings(tree, mesh, ShardingRules(minimum=1))
        state = new_state(lambda key: shared.PARAMS, optimizer, jax.random.key(0), shardings=layout)
        split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
        found = []
        for start in (0, 13, 26):
            state, figures = step(state, shard_batch(rows(start), mesh))
            found.append([float(figures["loss"]), float(figures["gradient_norm"])])
        return np.asarray(found), split

    assert jax.device_count() == 8
    expected, split = losses(make_mesh(MeshConfig(), jax.devices()[:1]))
    assert split == 0 and np.ptp(expected[:, 0]) > 1e-3, expected
    found, split = losses(make_mesh(MeshConfig(data=2, fsdp=4)))
    assert split > 20
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    print("done")
"""


def test_eight_devices_have_the_losses_of_one():
    check_on_eight_devices(ON_EIGHT_DEVICES, __file__)


def test_a_model_for_some_times_is_trained_at_those_alone():
    objective = FlowMatching(process=RectifiedFlow(shift=3.0))
    share = time_quantile(objective, 0.6)
    assert float(objective.compute_time(jnp.float32(share))) == pytest.approx(0.6, abs=1e-5)
    rows = batch(*([item(Grid(1, 2, 2), "a dot", number)] for number in range(64)))
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
