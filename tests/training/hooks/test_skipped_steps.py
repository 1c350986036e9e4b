"""Steps whose loss or gradient is not finite."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import UserError
from dit_video.tokens import PackedShape, make_empty_row
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.logging import MetricsLog, read_metrics
from dit_video.training.hooks.skipped_steps import SkippedLog
from dit_video.training.loop import LoopConfig, run
from dit_video.training.state import init_state
from support.training_state import make_step

OPTIMIZER = optax.adam(1e-2)
GOOD = {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(6, 2), "scale": np.ones(6, np.float32)}
NAN = GOOD | {"x": np.full((6, 2), math.nan, np.float32)}
STEEP = GOOD | {"scale": np.zeros(6, np.float32)}
"""A batch whose loss is finite and whose gradient is not."""


def loss(params, batch, step):
    del step
    error = batch["x"] @ params["w"] + params["b"] - 1
    return jnp.mean(jnp.square(error)) + jnp.sqrt(jnp.abs(params["b"] * batch["scale"])).mean(), {}


STEP = make_step(loss, OPTIMIZER, ema_decay=0.9)


def start():
    return init_state({"w": jnp.asarray([0.5, -0.25], jnp.float32), "b": jnp.float32(0.1)}, OPTIMIZER)


def data(*bad: int, batch: Any = NAN):
    """Return batches of which those of the given steps, counted from 1, are bad."""
    return lambda done: (batch if number in bad else GOOD for number in range(done + 1, 1000))


class FirstValues(SkippedLog):
    """A log of skipped steps with the first values of their batches."""

    def identify(self, batch):
        return {"x": jnp.asarray(batch["x"][0])}


def folder_run(folder, config, batches):
    checkpoints = Checkpoints(folder / "checkpoints")
    state = start()
    if checkpoints.latest() is not None:
        state, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    hooks = [MetricsLog(folder / "metrics.jsonl"), FirstValues(folder / "skipped.jsonl")]
    return run(STEP, state, batches, config=config, checkpoints=checkpoints, hooks=hooks)


def skipped(folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def assert_same(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("batch", [NAN, STEEP], ids=["loss", "gradient"])
def test_a_broken_step_leaves_every_bit_and_counts(batch):
    state, figures = STEP(start(), GOOD)
    assert figures["skipped"] == 0
    before = jax.device_get(state)
    state, figures = STEP(state, batch)
    assert figures["skipped"] == 1
    assert np.isfinite(figures["loss"]) == (batch is STEEP)
    assert not np.isfinite(figures["gradient_norm"])
    assert state.step == 2
    for part in ("params", "ema", "opt_state"):
        assert_same(getattr(state, part), getattr(before, part))
    after, figures = STEP(state, GOOD)
    assert figures["skipped"] == 0
    assert (after.params["w"] != before.params["w"]).all()


def test_a_run_goes_on_and_logs_the_skipped_batch(tmp_path):
    config = LoopConfig(steps=9, log_every=3, save_every=4)
    state = folder_run(tmp_path, config, data(4, 8))
    plain = start()
    for _ in range(7):
        plain, _ = STEP(plain, GOOD)
    assert_same(state.params, plain.params)
    assert state.step == 9
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["skipped"] for entry in entries] == [0, 1, 1]
    assert all(math.isfinite(entry["loss"]) for entry in entries)
    assert [entry["step"] for entry in skipped(tmp_path)] == [4, 8]
    assert skipped(tmp_path)[0]["loss"] == "nan"
    assert np.isnan(skipped(tmp_path)[0]["x"]).all()


def test_after_too_many_in_a_row_the_good_state_is_saved(tmp_path):
    config = LoopConfig(steps=20, log_every=50, save_every=50, max_consecutive_skips=3)
    with pytest.raises(
        UserError, match="not finite at 3 consecutive steps, 6 to 8; the state is that from before them"
    ):
        folder_run(tmp_path, config, data(2, 6, 7, 8, 9, 10, 11, 12))
    saved = Checkpoints(tmp_path / "checkpoints").latest()
    assert saved is not None
    assert 8 <= saved <= 10  # it is noticed two steps late
    restored, _ = Checkpoints(tmp_path / "checkpoints").restore(jax.eval_shape(start))
    plain = start()
    for _ in range(4):
        plain, _ = STEP(plain, GOOD)
    assert_same(restored.params, plain.params)
    state = folder_run(tmp_path, config, data())  # the data are fixed
    assert state.step == 20
    assert [entry["step"] for entry in skipped(tmp_path)] == [2, 6, 7, 8]


def test_resuming_cuts_the_skips_that_will_be_logged_again(tmp_path):
    log = SkippedLog(tmp_path / "skipped.jsonl")
    for step in (3, 5, 8):
        log.on_skip(step, {"loss": np.float32(math.inf), "gradient_norm": np.float32(1)}, {})
    with log.path.open("a") as file:
        file.write('{"step": 9, "lo')
    log.resume(5)
    assert skipped(tmp_path) == [{"step": step, "loss": "inf", "gradient_norm": 1.0} for step in (3, 5)]


def test_skipped_packed_rows_are_logged_by_their_examples():
    rows = jax.tree.map(lambda leaf: leaf[None], make_empty_row(PackedShape(tokens=4, text=2, segments=3), width=2))
    rows.examples[0, :2], rows.valid[0, :2] = (7, 9), True
    result = SkippedLog("").identify(rows)
    assert {name: np.asarray(array).tolist() for name, array in result.items()} == {
        "examples": [[7, 9, 0]],
        "valid": [[True, True, False]],
    }
    assert SkippedLog("").identify(np.zeros((2, 3))) == {}
