"""Trainer of one model in a folder, which starts a run or resumes it from its newest checkpoint."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from dit_video.core.errors import UserError
from dit_video.core.platform.chips import get_peak_flops
from dit_video.core.platform.provenance import get_code_version
from dit_video.distributed import make_shardings, shard_batch
from dit_video.training import goodput, loop
from dit_video.training.checkpoint import CheckpointPolicy, Checkpoints
from dit_video.training.folder_lock import lock_folder
from dit_video.training.hooks.hash_chain import CHAIN_FILE, HashChain
from dit_video.training.hooks.hook import Hook, PeriodicCall
from dit_video.training.hooks.logging import MetricsLog, SkippedLog
from dit_video.training.hooks.profiler import TraceConfig, Tracer
from dit_video.training.hooks.slow_hosts import SlowHostMonitor
from dit_video.training.hooks.throughput import GoodputLog, ThroughputMeter
from dit_video.training.optim.ema import EmaConfig, EmaSnapshots
from dit_video.training.program_report import ProgramLog
from dit_video.training.state import get_shapes_on_devices, make_on_devices
from dit_video.training.step import Metrics, StepFn, TrainStep, make_constant_shardings, make_step_program
from dit_video.training.time_recorder import TimeRecorder


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator over batches of host arrays, such as a generator.

    If it has an attribute `hash`, the hash of the data plan, which together with the step is the whole state of the
    data, then a training is continued with the same plan alone.
    """

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model's training run: step, data layout and outputs."""

    folder: Path
    """Folder of the logs, and of the checkpoints unless `checkpoints` is set."""
    checkpoints: str | os.PathLike | None = None
    """Folder or URL (`gs://…`) of the checkpoints; None for a folder in `folder`."""
    name: str
    """Name of the training in the run, such as `denoiser`: that of the progress bar, and of where the time goes."""
    init: Callable[[Array], dict[str, Any]]
    """Traceable function from a random key to parameters."""
    random_key: Array
    """Random key for `init`."""
    load_params: Callable[[], dict[str, Any] | None] | None = None
    """Function that loads the initial parameters of a new run, used instead of `init` unless it returns None. The
    parameters are freed as soon as the state is made. (Arrays that `init` holds itself would be compiled into the
    program and make it large.)"""
    train_step: TrainStep
    constants: tuple[PyTree, ...] = ()
    """Arrays passed to the step as further arguments, replicated on every device; see `TrainStep.compile`."""
    frozen_params: dict[str, Any] | None = None
    """Parameters that are not trained, such as an adapted model's or a teacher's: the last argument of the
    step. They are sharded like parameters, while constants are replicated."""
    averages: EmaConfig | None = None
    """Averages of the parameters whose snapshots are written; None for none."""
    config: loop.LoopConfig
    hooks: tuple[Hook, ...] = ()
    """Logs besides `metrics.jsonl`, and what else happens besides the steps."""
    flops_fn: Callable[[Any], float] | None = None
    """Function from a batch of host arrays to the floating-point operations of its step, as counted for MFU."""
    trace: TraceConfig | None = None
    """Steps that are traced; None for none."""
    mesh: Mesh
    """Mesh on which state and batches are sharded."""
    start_step: int = 0
    """Step at which this stage begins: the last step of the earlier stage, whose checkpoint it continues."""
    keep: CheckpointPolicy = dataclasses.field(default_factory=CheckpointPolicy)
    """Policy for preserving checkpoints."""
    resolved_config: Any = None
    """The whole config as JSON, which is stored in each checkpoint."""
    recorder: TimeRecorder = dataclasses.field(default_factory=TimeRecorder)
    """Recorder of where the time of the run goes."""

    def run(self, batches: Callable[[int], BatchIterator]) -> Any:
        """Train to `config.steps` and return the last state.

        Args:
          batches: Function from a step, counted from `start_step`, to an iterator over the batches from there on.

        Raises:
          UserError: If the data differ from those that the checkpoint was trained on, if another process trains in the
            folder, or if the checkpoint precedes this stage.
        """
        with lock_folder(self.folder):
            checkpoints = self.open_checkpoints()
            state, meta = self._restore_or_init(checkpoints)
            step = int(state.step)
            if step >= self.config.steps:
                return state
            if step < self.start_step:
                raise UserError(
                    f"the newest readable checkpoint of {self.folder} has step {step}, but this stage begins at step "
                    f"{self.start_step}. Remove the later checkpoints to continue the earlier stage."
                )
            data = batches(step - self.start_step)
            plan = getattr(data, "hash", "")
            if step > self.start_step and meta.get("plan", plan) != plan:
                data.close()
                raise UserError(
                    f"the data of {self.folder.parent} differ from those of its checkpoint at step {step} (plan "
                    f"{meta['plan']}, now {plan}). Restore the data, or start another run, which may begin with "
                    "this one's weights (init_from)."
                )
            self.recorder.resume(self.name, step)
            meter = ThroughputMeter(self.flops_fn, peak_flops_fn=get_peak_flops, mesh=self.mesh)
            program_log = ProgramLog(self.folder, self.mesh)
            return loop.run(
                self._compile_step(state, program_log),
                state,
                lambda _: _shard_batches(data, self.mesh, meter),
                config=self.config,
                checkpoints=checkpoints,
                hooks=[program_log, *self._list_hooks(meter, checkpoints, plan=plan)],
                title=f"training the {self.name}",
                meta={"plan": plan, "config": self.resolved_config},
                recorder=self.recorder,
            )

    def _restore_or_init(self, checkpoints: Checkpoints) -> tuple[Any, dict[str, Any]]:
        """Return the newest state that can be read, with its metadata, or the initial one, without any."""
        if checkpoints.latest() is None and not self.start_step:
            return self._make_state(), {}
        with self.recorder.phase(goodput.RESTORE):
            return self._restore(checkpoints)

    def replay(self, batches: Callable[[int], BatchIterator], first: int) -> Generator[tuple[Any, Metrics], None, None]:
        """Repeat the steps after a checkpoint, and yield the state and the metrics after each; nothing is written.

        A state is valid until the next one is requested.

        Args:
          batches: Function from a step, counted from `start_step`, to an iterator over the batches from there on.
          first: Step of the checkpoint; 0 for the initial state, which has none.

        Raises:
          MissingError: If there is no checkpoint of this step.
        """
        state = self._make_state() if first == 0 else self.restore(first)
        step = self._compile_step(state)
        with contextlib.closing(batches(first - self.start_step)) as data:
            for batch in data:
                state, metrics = step(state, shard_batch(batch, self.mesh))
                yield state, metrics

    def restore(self, step: int) -> Any:
        """Return the state of a checkpoint, on the mesh.

        Raises:
          MissingError: If there is no checkpoint of this step.
        """
        return self._restore(self.open_checkpoints(), step)[0]

    def open_checkpoints(self) -> Checkpoints:
        """Return the checkpoints, which need not exist yet."""
        return Checkpoints(self.checkpoints or self.folder / "checkpoints", keep=self.keep)

    def _make_state(self) -> Any:
        layout = functools.partial(make_shardings, mesh=self.mesh)
        return make_on_devices(self._init_state, self.random_key, *self._shard_loaded_params(), shardings=layout)

    def _restore(self, checkpoints: Checkpoints, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        layout = functools.partial(make_shardings, mesh=self.mesh)
        shapes = get_shapes_on_devices(self._init_state, shardings=layout)
        return checkpoints.restore(shapes, step, config=self.resolved_config)

    def get_program(self, batch: PyTree) -> tuple[Any, tuple[PyTree, ...]]:
        """Return the jitted step, and the shapes of its arguments, for devices that need not be present.

        Args:
          batch: A batch of host arrays, or their shapes.
        """
        options = {"constants": self.constants, "frozen_params": self._frozen_params}
        return make_step_program(self.train_step, self.init, batch, self.mesh, **options)

    @property
    def _frozen_params(self) -> tuple[dict[str, Any], ...]:
        return () if self.frozen_params is None else (self.frozen_params,)

    def _list_hooks(self, meter: ThroughputMeter, checkpoints: Checkpoints, *, plan: str) -> list[Hook]:
        start = self.describe_start(plan)
        hooks: list[Hook] = [
            HashChain(self.folder / CHAIN_FILE, start, read_digests=checkpoints.read_digests),
            MetricsLog(self.folder / "metrics.jsonl"),
            SkippedLog(self.folder / "skipped.jsonl"),
            meter,
            GoodputLog(self.recorder),
            SlowHostMonitor(self.recorder),
        ]
        if self.trace is not None:
            hooks.append(Tracer(self.trace))
        if self.averages is not None and self.averages.sigmas:
            snapshots = EmaSnapshots(self.folder / "snapshots")
            every = self.averages.snapshot_every
            hooks.append(PeriodicCall(every=every, function=snapshots.write, name="snapshot"))
        return [*hooks, *self.hooks]

    def describe_start(self, plan: str) -> dict[str, Any]:
        """Return what the hash chain records of a start."""
        devices = self.mesh.devices.flat
        return {
            "code": get_code_version(),
            "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
            "mesh": dict(self.mesh.shape),
            "plan": plan,
            "config": self.resolved_config,
        }

    def _shard_loaded_params(self) -> Iterator[dict[str, Any]]:
        """Yield the loaded parameters, if there are any, sharded like the state."""
        params = None if self.load_params is None else self.load_params()
        if params is not None:
            yield jax.device_put(params, make_shardings(params, self.mesh))

    def _init_state(self, key: Array, *loaded_params: dict[str, Any]) -> Any:
        params = loaded_params[0] if loaded_params else self.init(key)
        return self.train_step.init(params, is_fresh=not loaded_params)

    def _compile_step(self, state: Any, program_log: ProgramLog | None = None) -> StepFn:
        shardings = make_constant_shardings(self.constants, self._frozen_params, self.mesh)
        constants = jax.device_put((*self.constants, *self._frozen_params), shardings)
        observe = None if program_log is None or jax.process_index() else program_log.observe
        return self.train_step.compile(constants, state=state, observe=observe)


def _shard_batches(batches: BatchIterator, mesh: Mesh, meter: ThroughputMeter) -> Iterator[Any]:
    """Yield batches sharded on the mesh; closing the generator ends the threads that read ahead.

    The loop requests a batch while the devices still work on up to two earlier steps, and transfers are asynchronous.
    Batches therefore reach the devices ahead of their steps without another thread.
    """
    with contextlib.closing(batches):
        for batch in batches:
            meter.add(batch)
            yield shard_batch(batch, mesh)
