"""A training in its folder: from its newest checkpoint, or from the start."""

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
from dit_video.distributed import shard_batch, shardings
from dit_video.distributed.planner.hardware import peak_flops
from dit_video.training import loop
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.checkpoint_policy import Keep
from dit_video.training.folder_lock import locked
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.hooks.profiler import Profile
from dit_video.training.hooks.skipped_steps import SkippedLog, examples_of
from dit_video.training.hooks.throughput import Meter
from dit_video.training.hooks.writers import Log, Logs
from dit_video.training.losses.adversarial import Rival, make_adversarial_step
from dit_video.training.losses.autoencoder import AutoencoderLoss
from dit_video.training.optim.ema import Averages
from dit_video.training.optim.posthoc_ema import Snapshots
from dit_video.training.state import init_state, make_on_devices, shapes_on_devices
from dit_video.training.step import Loss, OwnStep, StatefulLoss, Step, make_step


@runtime_checkable
class Batches(Protocol):
    """Batches of host arrays, endless."""

    @property
    def hash(self) -> str:
        """With the step, the whole state of the data."""
        ...

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained, and how."""

    folder: Path
    """of its log, and of its checkpoints if these lie nowhere else"""
    checkpoints: str | os.PathLike | None = None
    """where they lie: a folder or an address (`gs://…`)"""
    title: str
    """of its progress"""
    init: Callable[[Array], dict[str, Any]]
    """parameters from a random key; traceable"""
    random_key: Array
    """for `init`"""
    start: Callable[[], dict[str, Any] | None] | None = None
    """Reads the parameters that a new training begins with, instead of `init`'s; they are not held any longer than it
    takes to make the state of them. (What `init` holds itself becomes a part of the program, which weights would make
    large.)"""
    loss: Loss | StatefulLoss | OwnStep
    constants: tuple[PyTree, ...] = ()
    """arrays that the loss is given too; see `make_step`"""
    frozen: dict[str, Any] | None = None
    """Parameters that are not trained, of which the trained ones are adapters or pupils: the last argument of the loss.
    They are laid out as parameters are, while constants lie whole on every device."""
    optimizer: optax.GradientTransformation
    ema_decay: float
    averages: Averages | None = None
    """kept beside the first one"""
    accumulate: int = 1
    """into how many parts a batch is divided; see `make_step`"""
    rival: Rival | None = None
    """what an autoencoder is trained against"""
    config: loop.LoopConfig
    logs: tuple[Log, ...] = ()
    """beside the file of metrics"""
    periodic: tuple[loop.Periodic, ...] = ()
    """what is done every so many steps"""
    work: Callable[[Any], float] | None = None
    """Floating-point operations of a step, as utilisation (MFU) counts them, by a batch of host arrays."""
    profile: Profile | None = None
    """steps that are traced"""
    mesh: Mesh
    """what state and batches are laid out on"""
    begin: int = 0
    """The step that this is trained from: the last of an earlier stage, whose checkpoint it continues."""
    keep: Keep = dataclasses.field(default_factory=Keep)
    """which checkpoints stay"""
    resolved: Any = None
    """the whole config as JSON, which every checkpoint holds"""

    def run(self, batches: Callable[[int], Batches]) -> Any:
        """The state after `config.steps` steps.

        Args:
          batches: from a step on, counted from `begin`.

        Raises:
          UserError: the data are others than those that the checkpoint was trained on; another process is at it.
        """
        with locked(self.folder):
            return self._run(batches)

    def _run(self, batches: Callable[[int], Batches]) -> Any:
        layout = functools.partial(shardings, mesh=self.mesh)
        checkpoints = Checkpoints(self.checkpoints or self.folder / "checkpoints", keep=self.keep)
        meta: dict[str, Any] = {}
        if checkpoints.latest() is None and not self.begin:
            state = make_on_devices(self._begin, self.random_key, *self._given(), shardings=layout)
        else:
            state, meta = checkpoints.restore(shapes_on_devices(self._begin, shardings=layout), config=self.resolved)
        if int(state.step) >= self.config.steps:
            return state
        done = int(state.step) - self.begin
        if done < 0:
            raise UserError(
                f"the newest checkpoint of {self.folder} that can be read is of step {int(state.step)}, before this "
                f"stage, which begins at {self.begin}; remove the later ones, and the earlier stage is continued"
            )
        data = batches(done)
        if done and meta.get("plan", data.hash) != data.hash:
            data.close()
            raise UserError(
                f"the data of {self.folder.parent} are not those of its checkpoint at step {int(state.step)} (plan "
                f"{meta['plan']}, now {data.hash}); put them back, or start another run"
            )
        meter = Meter(self.work, peak=peak_flops)
        with contextlib.closing(Logs((MetricsLog(self.folder / "metrics.jsonl"), *self.logs))) as log:
            return loop.run(
                self._step(),
                state,
                lambda _: _sharded(data, self.mesh, meter),
                config=self.config,
                checkpoints=checkpoints,
                log=log,
                title=self.title,
                meta={"plan": data.hash, "config": self.resolved},
                watch=self._watch(meter),
            )

    def _watch(self, meter: Meter) -> loop.Watch:
        periodic = self.periodic
        if self.averages is not None and self.averages.sigmas:
            snapshots = Snapshots(self.folder / "snapshots")
            periodic = (loop.Periodic(every=self.averages.snapshot_every, call=snapshots.write), *periodic)
        return loop.Watch(
            identify=examples_of,
            skipped=SkippedLog(self.folder / "skipped.jsonl"),
            derive=meter.figures,
            periodic=periodic,
            profile=self.profile,
        )

    def _given(self) -> Iterator[dict[str, Any]]:
        """What `start` reads, laid out as the state is."""
        params = None if self.start is None else self.start()
        if params is not None:
            yield jax.device_put(params, shardings(params, self.mesh))

    def _begin(self, key: Array, *given: dict[str, Any]) -> Any:
        """The state of the step: a `TrainState`, or what the loss or a rival makes of one."""
        params = given[0] if given else self.init(key)
        extra = self.loss.start(params, fresh=not given) if isinstance(self.loss, StatefulLoss) else None
        state = init_state(params, self.optimizer, extra, self.averages)
        if isinstance(self.loss, OwnStep):
            return self.loss.begin(state, self.optimizer)
        return state if self.rival is None else self.rival.join(state)

    def _step(self) -> Step:
        everywhere = jax.device_put(self.constants, NamedSharding(self.mesh, PartitionSpec()))
        if self.rival is None:
            if self.frozen is not None:
                everywhere = (*everywhere, jax.device_put(self.frozen, shardings(self.frozen, self.mesh)))
            if isinstance(self.loss, OwnStep):
                return self.loss.make_step(self.optimizer, ema_decay=self.ema_decay, constants=everywhere)
            return make_step(
                self.loss,
                self.optimizer,
                ema_decay=self.ema_decay,
                constants=everywhere,
                accumulate=self.accumulate,
            )
        if not isinstance(self.loss, AutoencoderLoss):
            raise TypeError(f"only an autoencoder is trained against a rival, not {type(self.loss).__name__}")
        return make_adversarial_step(
            self.loss, self.optimizer, self.rival, ema_decay=self.ema_decay, constants=everywhere
        )


def _sharded(batches: Batches, mesh: Mesh, meter: Meter) -> Iterator[Any]:
    """Batches on the mesh; closing this ends the threads that read ahead.

    The loop asks for a batch while the devices are busy with up to two steps before it, and the transfer is only begun
    here: so batches come to the devices ahead of their steps, without a thread of their own.
    """
    with contextlib.closing(batches):
        for batch in batches:
            meter.note(batch)
            yield shard_batch(batch, mesh)
