import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import GracefulStop, UserError
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.logging import MetricsLog, read_metrics
from dit_video.training.loop import LoopConfig, run
from support.devices import HANG, run_together

ROOT = Path(__file__).parents[2]
TIMES = {"first_step_seconds", "step_seconds", "steps_per_second", "data_wait"}


@jax.tree_util.register_dataclass
@dataclass
class State:
    step: Any
    params: Any
    opt_state: Any


OPTIMIZER = optax.adam(1e-2)


def start() -> State:
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4)), "b": jnp.zeros(4)}
    return State(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))


def like() -> State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), start())


def loss_of(params: Any, batch: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"] + params["b"]) - batch["y"]) ** 2)


@jax.jit
def plain_step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    loss, gradients = jax.value_and_grad(loss_of)(state.params, batch)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state)
    state = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
    return state, {"loss": loss, "norm": jnp.linalg.norm(gradients["w"])}


step = jax.jit(plain_step, donate_argnums=0)


def batches(done: int, *, bad: int = -1) -> Iterator[Any]:
    """A function of the step; the batch of step `bad` (counted from 1) is not a number."""
    while True:
        numbers = np.random.default_rng(done)
        x, y = numbers.normal(size=(16, 8)).astype(np.float32), numbers.normal(size=(16, 4)).astype(np.float32)
        done += 1
        yield {"x": x * (math.nan if done == bad else 1), "y": y}


def train(folder: Path, config: LoopConfig, **options: Any) -> State:
    checkpoints = Checkpoints(folder / "checkpoints")
    state = start() if checkpoints.latest() is None else checkpoints.restore(like())[0]
    log = MetricsLog(folder / "metrics.jsonl")
    return run(step, state, options.pop("data", batches), config=config, checkpoints=checkpoints, log=log, **options)


def curve(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: entry[name] for name in entry if name not in TIMES} for entry in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same(left: Any, right: Any) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def interrupt_at(step_number: int, number: int = signal.SIGINT):
    def on_step(done: int, _state: Any) -> None:
        if done == step_number:
            os.kill(os.getpid(), number)

    return on_step


def test_the_loop_is_the_plain_loop(tmp_path):
    state, want = start(), []
    for _, batch in zip(range(20), batches(0), strict=False):
        state, metrics = plain_step(state, batch)
        want.append(float(metrics["loss"]))
    result = train(tmp_path, LoopConfig(steps=20, log_every=1, save_every=8))
    assert_same(result, state)
    assert [entry["loss"] for entry in curve(tmp_path)] == want
    assert [entry["step"] for entry in curve(tmp_path)] == list(range(1, 21))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, number):
    config = LoopConfig(steps=20, log_every=1, save_every=5)
    whole = train(tmp_path / "whole", config)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(GracefulStop, match=rf"training, by {signal.Signals(number).name} after step 7, which is saved"):
        train(tmp_path / "parts", config, on_step=interrupt_at(7, number))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert Checkpoints(tmp_path / "parts" / "checkpoints").latest() == 7
    resumed = train(tmp_path / "parts", config)
    assert_same(resumed, whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert_same(train(tmp_path / "parts", config), whole)  # a finished run has nothing to do


def test_a_log_that_ran_ahead_is_cut(tmp_path):
    """Killed at step 9 without a word: the log holds steps that the checkpoint of step 5 does not know."""
    config = LoopConfig(steps=12, log_every=1, save_every=5)

    def die(done: int, _state: Any) -> None:
        if done == 9:
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        train(tmp_path / "parts", config, on_step=die)
    assert curve(tmp_path / "parts")[-1]["step"] == 9
    whole = train(tmp_path / "whole", config)
    assert_same(train(tmp_path / "parts", config), whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_entries_are_means_over_their_interval(tmp_path):
    train(tmp_path / "each", LoopConfig(steps=10, log_every=1))
    train(tmp_path / "some", LoopConfig(steps=10, log_every=4))
    losses = [entry["loss"] for entry in curve(tmp_path / "each")]
    entries = curve(tmp_path / "some")
    assert [entry["step"] for entry in entries] == [4, 8, 10]
    for entry, values in zip(entries, (losses[:4], losses[4:8], losses[8:]), strict=True):
        assert entry["loss"] == np.mean(values)
    first, second, _ = read_metrics(tmp_path / "some" / "metrics.jsonl")
    assert first["first_step_seconds"] > 0
    assert TIMES - second.keys() == {"first_step_seconds"}
    assert second["steps_per_second"] == pytest.approx(1 / second["step_seconds"])
    assert 0 <= second["data_wait"] <= 1


class Clock:
    """Stands for the loop's own, and goes on where it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slow(self, done: int) -> Iterator[Any]:
        """Batches that take 20 ms each."""
        for batch in batches(done):
            self.now += 0.02
            yield batch


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dit_video.training.hooks.metric_accumulator.time", clock)
    return clock


def test_waiting_for_data_is_seen(tmp_path, clock):
    # Where the step is done before the next batch is asked for, all time is waiting.
    train(tmp_path, LoopConfig(steps=12, log_every=6), data=clock.slow, on_step=lambda _, s: jax.block_until_ready(s))
    entry = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert entry["data_wait"] == pytest.approx(1)
    assert entry["step_seconds"] == pytest.approx(0.02)


def test_pauses_are_not_step_time(tmp_path, clock):
    def pause(*_: Any) -> None:
        clock.now += 0.05

    train(tmp_path, LoopConfig(steps=12, log_every=6, save_every=3), data=clock.slow, on_step=pause)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step_seconds"] == pytest.approx(0.02)


@pytest.mark.parametrize(("bad", "last"), [(1, None), (8, 5), (11, 10)])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, bad, last):
    saved = "nothing is saved yet" if last is None else f"the last saved checkpoint is step {last}"
    config = LoopConfig(steps=12, log_every=4, save_every=5)
    with pytest.raises(UserError, match=rf"the loss is nan at step {bad}; {saved}"):
        train(tmp_path, config, data=lambda done: batches(done, bad=bad))
    assert Checkpoints(tmp_path / "checkpoints").latest() == last


def test_gradients_that_are_not_finite_are_found_before_saving(tmp_path):
    """A finite loss whose update is not: only the state tells."""

    @jax.jit
    def breaking(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        new, metrics = plain_step(state, batch)
        bad = jnp.where(new.step == 4, jnp.inf, 0.0)
        return State(new.step, {**new.params, "w": new.params["w"] + bad}, new.opt_state), metrics

    checkpoints = Checkpoints(tmp_path)
    config = LoopConfig(steps=4, save_every=2)
    with pytest.raises(UserError, match=r"params/w is not finite after step 4; the last saved checkpoint is step 2"):
        run(breaking, start(), batches, config=config, checkpoints=checkpoints)
    assert checkpoints.latest() == 2


def test_bad_starts(tmp_path):
    train(tmp_path, LoopConfig(steps=6))
    with pytest.raises(UserError, match="steps=5 is invalid: the run is already at step 6"):
        train(tmp_path, LoopConfig(steps=5))
    with pytest.raises(UserError, match="starts at step 0, but its folder has a checkpoint of step 6"):
        run(step, start(), batches, config=LoopConfig(steps=9), checkpoints=Checkpoints(tmp_path / "checkpoints"))
    with pytest.raises(UserError, match="log_every=0 is invalid: it must be at least 1"):
        LoopConfig(steps=1, log_every=0)


def test_data_that_end_early(tmp_path):
    def few(done: int) -> Iterator[Any]:
        for _, batch in zip(range(3 - done), batches(done), strict=False):
            yield batch

    with pytest.raises(UserError, match=r"data ended after step 3. Repeat them, or train for 3 steps"):
        train(tmp_path, LoopConfig(steps=5, log_every=2), data=few)


def test_a_step_that_does_not_count_is_found(tmp_path):
    def forgets(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        new, metrics = plain_step(state, batch)
        return State(state.step, new.params, new.opt_state), metrics

    with pytest.raises(ValueError, match=r"state.step=0 is wrong after 2 steps"):
        run(forgets, start(), batches, config=LoopConfig(steps=2))


def test_the_iterator_is_closed_and_meta_is_saved(tmp_path):
    closed = []

    def data(done: int) -> Iterator[Any]:
        try:
            yield from batches(done)
        finally:
            closed.append(done)

    train(tmp_path, LoopConfig(steps=3), data=data, meta={"plan": "x"})
    assert closed == [0]
    assert Checkpoints(tmp_path / "checkpoints").restore(like())[1] == {"plan": "x"}


def test_a_loader_killed_by_the_same_signal_still_saves(tmp_path):
    """Ctrl-C reaches the loader's processes as well: that the data end then is no error."""

    def data(done: int) -> Iterator[Any]:
        for index, batch in enumerate(batches(done)):
            if index == 4:
                os.kill(os.getpid(), signal.SIGINT)
                raise RuntimeError("worker died")
            yield batch

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, LoopConfig(steps=9), data=data)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 4


def test_a_second_signal_stops_at_once(tmp_path):
    before, waited = signal.getsignal(signal.SIGINT), []

    def on_step(done: int, _state: Any) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # two that wait to be delivered are one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            waited.append(done)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, LoopConfig(steps=9), on_step=on_step)
    assert not waited
    assert Checkpoints(tmp_path / "checkpoints").latest() is None
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_can_train(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path, LoopConfig(steps=4))))
    thread.start()
    thread.join()
    assert int(results[0].step) == 4
    assert signal.getsignal(signal.SIGINT) is before


def child(code: str, *arguments: str) -> subprocess.Popen:
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + textwrap.dedent(code)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment, **pipes)


def test_killed_at_random_moments_a_run_ends_the_same(tmp_path):
    """Ctrl-C twice and one SIGKILL, at moments of any phase; the same command each time."""
    code = """
        import time
        from pathlib import Path
        from test_loop import LoopConfig, train
        slowly = lambda *_: time.sleep(0.01)
        print("ready", flush=True)
        train(Path(sys.argv[1]), LoopConfig(steps=60, log_every=1, save_every=9), on_step=slowly)
    """
    moments = random.Random(time.time_ns())
    codes = []
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGINT):
        process = child(code, str(tmp_path / "parts"))
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
        time.sleep(moments.uniform(0.0, 0.9))
        process.send_signal(number)
        output, _ = process.communicate(timeout=HANG)
        codes.append(process.returncode)
        assert process.returncode in (0, -number, 1, 130), output
    process = child(code, str(tmp_path / "parts"))
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, (codes, output)
    config = LoopConfig(steps=60, log_every=1, save_every=9)
    whole = train(tmp_path / "whole", config)
    assert_same(Checkpoints(tmp_path / "parts" / "checkpoints").restore(like())[0], whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_processes_stop_at_the_same_step(tmp_path):
    """One of two processes gets the signal; both save the same step, soon, however rarely they log."""
    imports = f"""
        import signal, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_loop import Checkpoints, LoopConfig, MetricsLog, batches, plain_step, run, start
        from dit_video.distributed import MeshConfig, make_mesh
        from jax.sharding import NamedSharding, PartitionSpec
    """
    code = """
        whole = NamedSharding(make_mesh(MeshConfig()), PartitionSpec())
        everywhere = lambda tree: jax.tree.map(lambda x: jax.make_array_from_process_local_data(whole, x), tree)
        sent = []
        def on_step(done, _):
            time.sleep(0.05)
            if done == 5 and index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                sent.append(done)
        state = everywhere(jax.device_get(start()))
        data = lambda done: (everywhere(batch) for batch in batches(done))
        options = {"checkpoints": Checkpoints(sys.argv[1] + "/c"), "log": MetricsLog(sys.argv[1] + "/m.jsonl")}
        try:
            config = LoopConfig(steps=4000, log_every=4000, save_every=4000)
            run(plain_step, state, data, config=config, on_step=on_step, **options)
        except KeyboardInterrupt as error:
            print("stopped at", options["checkpoints"].latest(), error)
    """
    outputs = run_together(imports, code, str(tmp_path))
    step = Checkpoints(tmp_path / "c").latest()
    assert step is not None
    assert 5 < step < 4000
    assert f"stopped at {step} training, by SIGTERM in process 1 after step {step}, which is saved" in outputs[0]
    assert f"stopped at {step} training, by SIGTERM after step {step}, which is saved" in outputs[1]
    alone = run(plain_step, start(), batches, config=LoopConfig(steps=step))
    restored, _ = Checkpoints(tmp_path / "c").restore(like())
    assert int(restored.step) == step
    np.testing.assert_allclose(restored.params["w"], alone.params["w"], rtol=1e-5)


def test_a_run_that_hangs_after_a_signal_ends_in_time(tmp_path):
    code = """
        import os, signal, time
        from pathlib import Path
        from test_loop import LoopConfig, train
        def hang(done, _):
            if done == 7:
                while not Path(sys.argv[1], "checkpoints", "5").is_dir():
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(600)
        train(Path(sys.argv[1]), LoopConfig(steps=60, save_every=5, stop_within=0.5), on_step=hang)
    """
    process = child(code, str(tmp_path))
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 75, output
    assert "error: the state was not saved within 0.5 s after SIGTERM. Earlier checkpoints are intact" in output
    assert Checkpoints(tmp_path / "checkpoints").latest() == 5
