"""Logs besides the JSON lines, periodic calls, throughput and traces."""

import math
import struct
import sys
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.distributed import RowPart
from dit_video.tokens import PackedShape, make_empty_row
from dit_video.training.hooks.hook import Hook, PeriodicCall
from dit_video.training.hooks.logging import MetricsLog, read_metrics
from dit_video.training.hooks.metric_logs import MonitoringConfig, TensorBoard, WeightsAndBiases
from dit_video.training.hooks.profiler import TraceConfig, Tracer
from dit_video.training.hooks.throughput import ThroughputMeter
from dit_video.training.loop import LoopConfig, run
from dit_video.training.state import init_state
from dit_video.training.step import Average
from support.training_state import make_step

OPTIMIZER = optax.sgd(0.1)


def loss(params, batch, step):
    error = jnp.square(params["w"] - batch["x"])
    # Only every third step has something in this bin.
    return error.mean(), {"bin": Average(jnp.where(step % 3 == 0, step, 0), jnp.where(step % 3 == 0, 1, 0))}


STEP = make_step(loss, OPTIMIZER, ema_decay=0.9)


def train(config, *hooks, batches=lambda done: iter(lambda: {"x": jnp.ones(3)}, None)):
    state = init_state({"w": jnp.zeros(3)}, OPTIMIZER)
    return run(STEP, state, batches, config=config, hooks=hooks)


def events(folder) -> list[Any]:
    """Read events as TensorBoard does: records of a length, its checksum, the event and its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    result = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            result.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return result


def test_event_files_hold_the_entries(tmp_path):
    pytest.importorskip("tensorboardX")
    log = TensorBoard(tmp_path / "tensorboard")
    log.resume(0)
    log.write(20, {"loss": 0.25, "norm": math.inf})
    log.write(40, {"loss": 0.125})
    log.close()
    again = TensorBoard(tmp_path / "tensorboard")
    again.resume(30)
    again.write(40, {"loss": 0.5})
    again.close()
    result = events(tmp_path / "tensorboard")
    scalars = [(event.step, value.tag, value.simple_value) for event in result for value in event.summary.value]
    assert sorted(scalars) == [(20, "loss", 0.25), (40, "loss", 0.125), (40, "loss", 0.5)]
    # From the second file on, steps from 31 on count.
    assert 31 in [event.step for event in result if event.HasField("session_log")]


def test_weights_and_biases_receives_the_finite_entries_of_one_run(tmp_path, monkeypatch):
    calls: list[Any] = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(
            log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
        )

    stand_in = SimpleNamespace(init=init, login=lambda: True, Error=ConnectionError)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for step in (0, 40):
        log = WeightsAndBiases("videos", tmp_path / "run" / "denoiser")
        log.resume(step)
        log.write(step + 20, {"loss": 0.5, "norm": math.nan})
        log.close()
    first, second = calls[0::3]
    assert first == second  # one run, continued
    assert (first["project"], first["name"], first["resume"]) == ("videos", "run", "allow")
    assert first["id"] == (tmp_path / "run" / "denoiser" / "wandb_run.txt").read_text()
    assert calls[2::3] == ["end", "end"]
    assert calls[1::3] == [(20, {"loss": 0.5}), (60, {"loss": 0.5})]


@pytest.mark.parametrize("call", ["login", "init"])
def test_a_refusal_of_weights_and_biases_is_a_user_error(tmp_path, monkeypatch, call):
    def refuse(**_):
        raise ConnectionError("not logged in")

    functions = {"login": lambda: True, "init": lambda **_: None, call: refuse}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**functions, Error=ConnectionError))
    with pytest.raises(UserError, match=r"monitoring\.wandb='videos' .*not logged in.* wandb login"):
        WeightsAndBiases("videos", tmp_path).resume(0)


def read_logged_names(path):
    """Return the names of all values that a file of Weights & Biases logs, but for its own.

    The file is a log of LevelDB: after seven bytes, blocks of 32 KiB with parts of records, each after its checksum (4
    bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record, names = path.read_bytes(), 7, b"", set()
    while position + 7 <= len(content):
        if (rest := 32_768 - position % 32_768) < 7:
            position += rest
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            items = Record.FromString(record).history.item
            names |= {item.key or ".".join(item.nested_key) for item in items}
            record = b""
    return {name for name in names if not name.startswith("_")}


@pytest.mark.slow
def test_the_real_weights_and_biases_joins_both_parts_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 40):
        log = WeightsAndBiases("videos", tmp_path)
        log.resume(step)
        log.write(step + 20, {"loss": 0.5, "norm": math.nan})
        log.close()
        time.sleep(1)  # the names of the folders hold the second
    name = (tmp_path / "wandb_run.txt").read_text()
    parts = list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(parts) == 2  # the service joins them by their name
    assert [read_logged_names(part) for part in parts] == [{"loss"}] * 2


@pytest.mark.parametrize(("package", "make"), [("tensorboardX", TensorBoard), ("wandb", WeightsAndBiases)])
def test_a_missing_package_is_reported_with_its_installation(tmp_path, monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingError, match=rf"pip install 'dit-video\[{package.lower().removesuffix('x')}\]'"):
        make(*(["videos"] if package == "wandb" else []), tmp_path)


def test_contradictory_monitoring_configs_are_refused():
    with pytest.raises(UserError, match=r"sample_every=0. Set sample_every"):
        MonitoringConfig(prompts=("a ball",))
    with pytest.raises(UserError, match=r"validate_every=-1 is invalid: it must be at least 0"):
        MonitoringConfig(validate_every=-1)
    with pytest.raises(UserError, match="validation_batches"):
        MonitoringConfig(validation_batches=0)


def test_periodic_calls_are_logged_if_they_return_figures(tmp_path):
    called: list[tuple[str, int]] = []

    def validate(done, state):
        called.append(("validate", done))
        return {"validation_loss": float(state.ema["w"][0])}

    def snapshot(done, _state):
        called.append(("snapshot", done))
        return {}

    other: list[tuple[int, set[str]]] = []

    class Second(Hook):
        def write(self, step, values):
            other.append((step, set(values)))

    second = Second()
    calls = PeriodicCall(every=4, function=validate), PeriodicCall(every=3, function=snapshot)
    state = train(LoopConfig(steps=10, log_every=5), MetricsLog(tmp_path / "m.jsonl"), second, *calls)
    assert called == [(name, step) for step, names in [(3, "s"), (4, "v"), (6, "s"), (8, "v"), (9, "s"), (10, "vs")]
                      for name in [{"s": "snapshot", "v": "validate"}[letter] for letter in names]]  # fmt: skip
    entries = read_metrics(tmp_path / "m.jsonl")
    assert [entry["step"] for entry in entries] == [4, 5, 8, 10]
    assert [entry["step"] for entry in entries if "validation_loss" in entry] == [4, 8, 10]
    assert entries[-1]["validation_loss"] == pytest.approx(float(state.ema["w"][0]))
    assert [step for step, _ in other] == [4, 5, 8, 10]
    # Steps 0 to 3 have 0 and 3 in the bin, step 4 nothing, 5 to 7 one, 8 and 9 one.
    assert [entry.get("bin") for entry in entries] == [1.5, None, 6, 9]


def make_row(tokens: int):
    one = make_empty_row(PackedShape(tokens=8, text=2, segments=2), width=2)
    one.segments[:tokens] = 1
    return jax.tree.map(lambda leaf: leaf[None], one)


@pytest.mark.parametrize(("mesh_devices", "parts"), [(4, 4), (4, 2), (8, 1)])
def test_throughput_is_that_of_all_parts_of_the_rows_on_all_devices_of_the_mesh(monkeypatch, mesh_devices, parts):
    """Four processes may hold four parts of the rows, or share them: as many tokens are counted as are trained on."""
    mesh = jax.sharding.Mesh(np.repeat(jax.devices()[:1], mesh_devices), ("context",))
    monkeypatch.setattr(RowPart, "from_mesh", staticmethod(lambda mesh: RowPart(0, parts, (0,))))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    meter = ThroughputMeter(
        lambda batch: 1e9 * float((batch.segments > 0).sum()),
        peak_flops_fn=lambda devices: 4e9 * len(devices),
        mesh=mesh,
    )
    meter.add(make_row(6))
    result = meter.derive({"step_seconds": 2.0})
    assert result["tokens_per_second"] == pytest.approx(parts * 3.0)
    assert result["model_flops_per_second"] == pytest.approx(parts * 3e9)
    assert result["mfu"] == pytest.approx(parts * 3e9 / (4e9 * mesh_devices))


def test_throughput_counts_tokens_and_utilisation():
    meter = ThroughputMeter(
        lambda batch: 1e9 * float((batch.segments > 0).sum()), peak_flops_fn=lambda devices: 4e9 * len(devices)
    )
    for tokens in (6, 8):
        meter.add(make_row(tokens))
    result = meter.derive({"step_seconds": 2.0})
    devices = jax.local_device_count()
    assert result == pytest.approx(
        {"tokens_per_second": 3.5, "model_flops_per_second": 3.5e9, "mfu": 3.5e9 / (4e9 * devices)}
    )
    assert meter.derive({"step_seconds": 2.0}) == {}  # counted anew
    meter.add(make_row(4))
    assert meter.derive({"loss": 1.0}) == {}  # the first step alone has no time of its own
    unknown = ThroughputMeter(lambda batch: 1.0)
    unknown.add(make_row(4))
    assert set(unknown.derive({"step_seconds": 1.0})) == {"tokens_per_second", "model_flops_per_second"}
    pixels = ThroughputMeter()
    pixels.add(np.zeros((2, 3, 4, 4, 3), np.uint8))
    assert pixels.derive({"step_seconds": 1.0}) == {}


def test_entries_hold_derived_figures_and_the_device_memory(tmp_path, monkeypatch):
    device = SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 5, "peak_bytes_in_use": 7, "other": 1})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])

    class Twice(Hook):
        def derive(self, values):
            return {"twice": 2 * values["loss"]}

    train(LoopConfig(steps=4, log_every=2), MetricsLog(tmp_path / "m.jsonl"), Twice())
    for entry in read_metrics(tmp_path / "m.jsonl"):
        assert entry["twice"] == 2 * entry["loss"]
        assert (entry["device_memory_bytes"], entry["device_memory_peak_bytes"]) == (5, 7)


def test_some_steps_are_traced(tmp_path, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    real = jax.profiler.StepTraceAnnotation
    monkeypatch.setattr(
        jax.profiler,
        "StepTraceAnnotation",
        lambda name, step_num: calls.append(step_num) or real(name, step_num=step_num),
    )
    train(LoopConfig(steps=8), Tracer(TraceConfig(tmp_path / "trace", 3, 5)))
    assert calls == [("start", str(tmp_path / "trace")), 3, 4, 5, "stop"]
    calls.clear()
    train(LoopConfig(steps=4), Tracer(TraceConfig(tmp_path / "trace", 3, 50)))
    assert calls == [("start", str(tmp_path / "trace")), 3, 4, "stop"]
    with pytest.raises(UserError, match="cannot trace steps 5 to 3"):
        TraceConfig(tmp_path, 5, 3)


@pytest.mark.parametrize("call", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_made_or_written_is_told_once_and_the_training_goes_on(tmp_path, monkeypatch, call):
    def fail(*_arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    monkeypatch.setattr(jax.profiler, call, fail)
    with pytest.warns(UserWarning, match="no trace of steps 3 to 5 is written to .*No space left") as warned:
        train(LoopConfig(steps=8), Tracer(TraceConfig(tmp_path / "trace", 3, 5)))
    assert len(warned) == 1


def test_a_trace_is_written(tmp_path):
    train(LoopConfig(steps=4), Tracer(TraceConfig(tmp_path / "trace", 3, 3)))
    assert [
        path for path in (tmp_path / "trace").rglob("*") if path.name.endswith(".xplane.pb") and path.stat().st_size
    ]
