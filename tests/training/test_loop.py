import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import AgreedStop, GracefulStop, UserError
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks.hook import Hook, PeriodicCall
from dit_video.training.hooks.logging import MetricsLog, read_metrics
from dit_video.training.loop import LoopConfig, run
from support.devices import HANG, PROGRAMS, run_together
from support.loop_training import State, get_state_shapes, init_state, make_batches, plain_step, step, train

ROOT = Path(__file__).parents[2]
TIMES = {
    *("step_seconds", "steps_per_second", "data_wait", "host_seconds", "interval_seconds", "unix_seconds"),
    "hook_seconds",
}


def is_time(name: str) -> bool:
    return name in TIMES or name.endswith("_seconds")


def curve(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: entry[name] for name in entry if not is_time(name)} for entry in read_metrics(folder / "metrics.jsonl")
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
    state, want = init_state(), []
    for _, batch in zip(range(20), make_batches(0), strict=False):
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
    """A run killed at step 9 has logged steps that follow its last checkpoint, of step 5."""
    config = LoopConfig(steps=12, log_every=1, save_every=5)

    def die(done: int, _state: Any) -> None:
        if done == 10:
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
    assert {name for name in first if is_time(name)} == {
        *TIMES,
        *("first_step_seconds", "first_batch_seconds", "compile_seconds"),
    }
    assert first["first_step_seconds"] > first["compile_seconds"] > 0
    assert {name for name in second if is_time(name)} == TIMES
    assert second["steps_per_second"] == pytest.approx(1 / second["step_seconds"])
    assert 0 <= second["data_wait"] <= 1


class Clock:
    """A fake clock of the loop, which tests advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()

    def slow(self, done: int) -> Iterator[Any]:
        """Yield batches that take 20 ms each."""
        for batch in make_batches(done):
            self.now += 0.02
            yield batch


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dit_video.training.step_log.time", clock)
    return clock


def test_entries_report_the_wait_for_data(tmp_path, clock):
    # Steps end before the next batch is requested, so all time is spent waiting.
    train(tmp_path, LoopConfig(steps=12, log_every=6), data=clock.slow, on_step=lambda _, s: jax.block_until_ready(s))
    entry = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert entry["data_wait"] == pytest.approx(1)
    assert entry["step_seconds"] == pytest.approx(0.02)


def test_pauses_are_not_step_time(tmp_path, clock):
    def pause(*_: Any) -> None:
        clock.now += 0.05

    train(tmp_path, LoopConfig(steps=12, log_every=6, save_every=3), data=clock.slow, on_step=pause)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step_seconds"] == pytest.approx(0.02)


def test_entries_report_where_the_time_went(tmp_path, clock):
    """Each second of the run is in an entry: of steps, of compilation, of saving or of a hook by its name."""

    def validate(done: int, _state: Any) -> Mapping[str, float]:
        clock.now += 3
        return {}

    class SlowCheckpoints(Checkpoints):
        def save(self, step, *args, **options):
            clock.now += 5
            return super().save(step, *args, **options)

    def start_step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        if int(state.step) in (0, 7):  # the shapes of batch 8 are new
            clock.now += 100
        return step(state, batch)

    def batches(done: int) -> Iterator[Any]:
        for number, batch in enumerate(make_batches(done), start=1):
            clock.now += 40 if number == 1 else 0.5
            yield {name: each[:8] for name, each in batch.items()} if number == 8 else batch

    run(
        start_step,
        init_state(),
        batches,
        config=LoopConfig(steps=12, log_every=4, save_every=6),
        checkpoints=SlowCheckpoints(tmp_path / "checkpoints"),
        hooks=[
            MetricsLog(tmp_path / "metrics.jsonl"),
            PeriodicCall(every=4, function=validate, name="validate"),
        ],
    )
    first, second, third = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["first_batch_seconds"], first["compile_seconds"], first["validate_seconds"]) == (40, 100, 3)
    assert first["first_step_seconds"] == 140
    assert first["interval_seconds"] == 140 + 3 * 0.5 + 3
    assert first["step_seconds"] == 0.5
    assert "save_seconds" not in first
    assert second["interval_seconds"] == 4 * 0.5 + 100 + 5 + 3
    assert (second["save_seconds"], second["compile_seconds"]) == (5, 100)
    assert second["step_seconds"] == (4 * 0.5 + 100) / 4
    assert third["interval_seconds"] == 4 * 0.5 + 3
    assert {"compile_seconds", "save_seconds", "first_batch_seconds"} & third.keys() == set()
    assert time.time() - 60 < first["unix_seconds"] <= second["unix_seconds"] <= third["unix_seconds"] <= time.time()


@pytest.mark.parametrize(("bad", "last"), [(1, None), (8, 5), (11, 10)])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, bad, last):
    saved = "nothing is saved yet" if last is None else f"the last saved checkpoint is step {last}"
    config = LoopConfig(steps=12, log_every=4, save_every=5)
    with pytest.raises(UserError, match=rf"the loss is nan at step {bad}; {saved}"):
        train(tmp_path, config, data=lambda done: make_batches(done, bad=bad))
    assert Checkpoints(tmp_path / "checkpoints").latest() == last


def test_gradients_that_are_not_finite_are_found_before_saving(tmp_path):
    """The loss is finite and its update is not, so only the state shows it."""

    @jax.jit
    def breaking(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        new, metrics = plain_step(state, batch)
        bad = jnp.where(new.step == 4, jnp.inf, 0.0)
        return State(new.step, {**new.params, "w": new.params["w"] + bad}, new.opt_state), metrics

    checkpoints = Checkpoints(tmp_path)
    config = LoopConfig(steps=4, save_every=2)
    with pytest.raises(UserError, match=r"params/w is not finite after step 4; the last saved checkpoint is step 2"):
        run(breaking, init_state(), make_batches, config=config, checkpoints=checkpoints)
    assert checkpoints.latest() == 2


def test_invalid_starts_of_a_loop_are_refused(tmp_path):
    train(tmp_path, LoopConfig(steps=6))
    with pytest.raises(UserError, match="steps=5 is invalid: the run is at step 6"):
        train(tmp_path, LoopConfig(steps=5))
    with pytest.raises(UserError, match="starts at step 0, but its folder has a checkpoint of step 6"):
        run(
            step,
            init_state(),
            make_batches,
            config=LoopConfig(steps=9),
            checkpoints=Checkpoints(tmp_path / "checkpoints"),
        )
    with pytest.raises(UserError, match="log_every=0 is invalid: it must be at least 1"):
        LoopConfig(steps=1, log_every=0)


def test_data_that_end_early_are_reported(tmp_path):
    def few(done: int) -> Iterator[Any]:
        for _, batch in zip(range(3 - done), make_batches(done), strict=False):
            yield batch

    with pytest.raises(UserError, match=r"data ended after step 3. Repeat them, or train for 3 steps"):
        train(tmp_path, LoopConfig(steps=5, log_every=2), data=few)


def test_a_step_that_does_not_advance_the_counter_is_reported(tmp_path):
    def forgets(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        new, metrics = plain_step(state, batch)
        return State(state.step, new.params, new.opt_state), metrics

    with pytest.raises(ValueError, match=r"state.step=0 is wrong after 2 steps"):
        run(forgets, init_state(), make_batches, config=LoopConfig(steps=2))


def test_the_iterator_is_closed_and_meta_is_saved(tmp_path):
    closed = []

    def data(done: int) -> Iterator[Any]:
        try:
            yield from make_batches(done)
        finally:
            closed.append(done)

    train(tmp_path, LoopConfig(steps=3), data=data, meta={"plan": "x"})
    assert closed == [0]
    assert Checkpoints(tmp_path / "checkpoints").restore(get_state_shapes())[1] == {"plan": "x"}


def test_a_loader_killed_by_the_same_signal_still_saves(tmp_path):
    """Ctrl-C reaches the processes of the loader as well, so the data may end then without an error."""

    def data(done: int) -> Iterator[Any]:
        for index, batch in enumerate(make_batches(done)):
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
            time.sleep(0.2)  # two pending signals would be delivered as one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            waited.append(done)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, LoopConfig(steps=9), on_step=on_step)
    assert not waited
    assert Checkpoints(tmp_path / "checkpoints").latest() is None
    assert signal.getsignal(signal.SIGINT) is before


def test_another_signal_is_no_repetition(tmp_path):
    """Ctrl-C on a script that starts the processes: they get SIGINT of the terminal, and SIGTERM of the script."""

    def on_step(done: int, _state: Any) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(AgreedStop):
        train(tmp_path, LoopConfig(steps=9), on_step=on_step)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 3


def test_hooks_that_were_resumed_are_closed_if_the_start_fails():
    class Log(Hook):
        is_open = False

        def resume(self, step: int) -> None:
            self.is_open = True

        def close(self) -> None:
            self.is_open = False

    def fail(_: int) -> Iterator[Any]:
        assert log.is_open
        raise UserError("no clips")

    log = Log()
    with pytest.raises(UserError, match="no clips"):
        run(step, init_state(), fail, config=LoopConfig(steps=9), hooks=[log])
    assert not log.is_open


def test_a_thread_other_than_the_main_one_can_train(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(tmp_path, LoopConfig(steps=4))))
    thread.start()
    thread.join()
    assert int(results[0].step) == 4
    assert signal.getsignal(signal.SIGINT) is before


def start_process(*arguments: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, "-P", str(PROGRAMS / "interrupted_loop.py"), *arguments], env=environment, **pipes
    )


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_the_same(tmp_path):
    """The same command is interrupted twice and killed once, at moments of any phase."""
    moments = random.Random(time.time_ns())
    codes = []
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGINT):
        process = start_process("slow", str(tmp_path / "parts"))
        assert process.stdout is not None
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
        time.sleep(moments.uniform(0.0, 0.9))
        process.send_signal(number)
        output, _ = process.communicate(timeout=HANG)
        codes.append(process.returncode)
        assert process.returncode in (0, -number, 1, 130), output
    process = start_process("slow", str(tmp_path / "parts"))
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0, (codes, output)
    config = LoopConfig(steps=60, log_every=1, save_every=9)
    whole = train(tmp_path / "whole", config)
    assert_same(Checkpoints(tmp_path / "parts" / "checkpoints").restore(get_state_shapes())[0], whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.slow
def test_processes_stop_at_the_same_step(tmp_path):
    """One of two processes gets the signal, and both soon save the same step, even if they log rarely."""
    outputs = run_together("loop_in_two_processes.py", str(tmp_path))
    step = Checkpoints(tmp_path / "c").latest()
    assert step is not None
    assert 5 < step < 4000
    assert f"stopped at {step} training, by SIGTERM in process 1 after step {step}, which is saved" in outputs[0]
    assert f"stopped at {step} training, by SIGTERM after step {step}, which is saved" in outputs[1]
    alone = run(plain_step, init_state(), make_batches, config=LoopConfig(steps=step))
    restored, _ = Checkpoints(tmp_path / "c").restore(get_state_shapes())
    assert int(restored.step) == step
    np.testing.assert_allclose(restored.params["w"], alone.params["w"], rtol=1e-5)


def test_a_run_that_hangs_after_a_signal_ends_in_time(tmp_path):
    process = start_process("hang", str(tmp_path))
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 75, output
    assert "error: the state was not saved within 0.5 s after SIGTERM. Earlier checkpoints are intact" in output
    assert Checkpoints(tmp_path / "checkpoints").latest() == 5
