"""Trainer of one model in a folder, which starts a run or resumes it from its newest checkpoint."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from dit_video.core.errors import UserError
from dit_video.distributed import make_shardings, shard_batch
from dit_video.distributed.planner.hardware import get_peak_flops
from dit_video.training import loop
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.checkpoint_policy import CheckpointPolicy
from dit_video.training.folder_lock import lock_folder
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.hooks.metric_logs import CombinedLog, Log
from dit_video.training.hooks.profiler import TraceConfig
from dit_video.training.hooks.skipped_steps import SkippedLog, get_example_ids
from dit_video.training.hooks.throughput import ThroughputMeter
from dit_video.training.losses.adversarial import DiscriminatorTraining, make_adversarial_step
from dit_video.training.losses.autoencoder import AutoencoderLoss
from dit_video.training.optim.ema import EmaConfig
from dit_video.training.optim.posthoc_ema import EmaSnapshots
from dit_video.training.state import get_shapes_on_devices, init_state, make_on_devices
from dit_video.training.step import Loss, OwnStep, StatefulLoss, StepFn, make_step


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator over batches of host arrays."""

    @property
    def hash(self) -> str:
        """Return the hash of the data plan, which together with the step is the whole state of the data."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A model's training run: loss, optimizer, data layout and outputs."""

    folder: Path
    """Folder of the logs, and of the checkpoints unless `checkpoints` is set."""
    checkpoints: str | os.PathLike | None = None
    """Folder or URL (`gs://…`) of the checkpoints; None for a folder in `folder`."""
    title: str
    """Title of the progress bar."""
    init: Callable[[Array], dict[str, Any]]
    """Traceable function from a random key to parameters."""
    random_key: Array
    """Random key for `init`."""
    load_params: Callable[[], dict[str, Any] | None] | None = None
    """Function that loads the initial parameters of a new run, used instead of `init` unless it returns None. The
    parameters are freed as soon as the state is made. (Arrays that `init` holds itself would be compiled into the
    program and make it large.)"""
    loss: Loss | StatefulLoss | OwnStep
    constants: tuple[PyTree, ...] = ()
    """Arrays passed to the loss as further arguments, replicated on every device; see `make_step`."""
    frozen_params: dict[str, Any] | None = None
    """Parameters that are not trained, such as those of an adapted model or of a teacher: the last argument of the
    loss. They are sharded like parameters, while constants are replicated."""
    optimizer: optax.GradientTransformation
    ema_decay: float
    averages: EmaConfig | None = None
    """Further averages of the parameters; None for none."""
    accumulation_steps: int = 1
    """Number of microbatches that a batch is divided into; see `make_step`."""
    discriminator: DiscriminatorTraining | None = None
    """Discriminator that an autoencoder is trained against; None for none."""
    config: loop.LoopConfig
    logs: tuple[Log, ...] = ()
    """Logs besides `metrics.jsonl`."""
    periodic: tuple[loop.PeriodicCall, ...] = ()
    """Functions that are called at intervals of steps."""
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

    def run(self, batches: Callable[[int], BatchIterator]) -> Any:
        """Train to `config.steps` and return the last state.

        Args:
          batches: Function from a step, counted from `start_step`, to an iterator over the batches from there on.

        Raises:
          UserError: The data differ from those that the checkpoint was trained on, or another process trains in the
            folder.
        """
        with lock_folder(self.folder):
            return self._run(batches)

    def _run(self, batches: Callable[[int], BatchIterator]) -> Any:
        layout = functools.partial(make_shardings, mesh=self.mesh)
        checkpoints = Checkpoints(self.checkpoints or self.folder / "checkpoints", keep=self.keep)
        meta: dict[str, Any] = {}
        if checkpoints.latest() is None and not self.start_step:
            state = make_on_devices(self._init_state, self.random_key, *self._shard_loaded_params(), shardings=layout)
        else:
            shapes = get_shapes_on_devices(self._init_state, shardings=layout)
            state, meta = checkpoints.restore(shapes, config=self.resolved_config)
        if int(state.step) >= self.config.steps:
            return state
        stage_steps_done = int(state.step) - self.start_step
        if stage_steps_done < 0:
            raise UserError(
                f"the newest readable checkpoint of {self.folder} has step {int(state.step)}, but this stage begins at "
                f"step {self.start_step}. Remove the later checkpoints to continue the earlier stage."
            )
        data = batches(stage_steps_done)
        if stage_steps_done and meta.get("plan", data.hash) != data.hash:
            data.close()
            raise UserError(
                f"the data of {self.folder.parent} differ from those of its checkpoint at step {int(state.step)} (plan "
                f"{meta['plan']}, now {data.hash}). Restore the data, or start another run."
            )
        meter = ThroughputMeter(self.flops_fn, peak_flops_fn=get_peak_flops)
        with contextlib.closing(CombinedLog((MetricsLog(self.folder / "metrics.jsonl"), *self.logs))) as log:
            return loop.run(
                self._make_step(),
                state,
                lambda _: _shard_batches(data, self.mesh, meter),
                config=self.config,
                checkpoints=checkpoints,
                log=log,
                title=self.title,
                meta={"plan": data.hash, "config": self.resolved_config},
                watch=self._make_watch(meter),
            )

    def _make_watch(self, meter: ThroughputMeter) -> loop.Watch:
        periodic = self.periodic
        if self.averages is not None and self.averages.sigmas:
            snapshots = EmaSnapshots(self.folder / "snapshots")
            periodic = (loop.PeriodicCall(every=self.averages.snapshot_every, call=snapshots.write), *periodic)
        return loop.Watch(
            identify=get_example_ids,
            skipped=SkippedLog(self.folder / "skipped.jsonl"),
            derive=meter.compute_and_reset,
            periodic=periodic,
            profile=self.trace,
        )

    def _shard_loaded_params(self) -> Iterator[dict[str, Any]]:
        """Yield the loaded parameters, if there are any, sharded like the state."""
        params = None if self.load_params is None else self.load_params()
        if params is not None:
            yield jax.device_put(params, make_shardings(params, self.mesh))

    def _init_state(self, key: Array, *loaded_params: dict[str, Any]) -> Any:
        """Return the initial state of the step: a `TrainState`, or the composite state of the loss."""
        params = loaded_params[0] if loaded_params else self.init(key)
        extra = self.loss.start(params, fresh=not loaded_params) if isinstance(self.loss, StatefulLoss) else None
        state = init_state(params, self.optimizer, extra, self.averages)
        if isinstance(self.loss, OwnStep):
            return self.loss.begin(state, self.optimizer)
        return state if self.discriminator is None else self.discriminator.init_state(state)

    def _make_step(self) -> StepFn:
        constants = jax.device_put(self.constants, NamedSharding(self.mesh, PartitionSpec()))
        if self.discriminator is not None:
            if not isinstance(self.loss, AutoencoderLoss):
                raise TypeError(f"loss={type(self.loss).__name__} is invalid: a discriminator needs an autoencoder.")
            options: dict[str, Any] = {"ema_decay": self.ema_decay, "constants": constants}
            return make_adversarial_step(self.loss, self.optimizer, self.discriminator, **options)
        if self.frozen_params is not None:
            frozen = jax.device_put(self.frozen_params, make_shardings(self.frozen_params, self.mesh))
            constants = (*constants, frozen)
        options = {"ema_decay": self.ema_decay, "constants": constants}
        if isinstance(self.loss, OwnStep):
            return self.loss.make_step(self.optimizer, **options)
        return make_step(self.loss, self.optimizer, accumulation_steps=self.accumulation_steps, **options)


def _shard_batches(batches: BatchIterator, mesh: Mesh, meter: ThroughputMeter) -> Iterator[Any]:
    """Yield batches sharded on the mesh; closing the generator ends the threads that read ahead.

    The loop requests a batch while the devices still work on up to two earlier steps, and transfers are asynchronous.
    Batches therefore reach the devices ahead of their steps without another thread.
    """
    with contextlib.closing(batches):
        for batch in batches:
            meter.add(batch)
            yield shard_batch(batch, mesh)
