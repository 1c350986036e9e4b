"""A training in its folder: from its newest checkpoint, or from the start."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, PyTree

from dit_video.distributed import shard_batch, shardings
from dit_video.errors import UserError
from dit_video.training import loop
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.logging import MetricsLog
from dit_video.training.state import make_on_devices, shapes_on_devices
from dit_video.training.step import Step


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


def train(
    folder: Path,
    begin: Callable[..., Any],
    step: Step,
    batches: Callable[[int], Batches],
    *,
    config: loop.LoopConfig,
    mesh: jax.sharding.Mesh,
    random_key: Array,
    title: str,
    given: tuple[PyTree, ...] = (),
) -> Any:
    """The state after `config.steps` steps, with its checkpoints and log in `folder`.

    Args:
      folder: of this training alone.
      begin: the state of step 0 from a random key (and from what is given); traceable. A state of the same shapes comes
        from the key alone.
      step: what `make_step` gives for such a state.
      batches: from a step on.
      config: how long, and how often it logs and saves.
      mesh: what state and batches are laid out on.
      random_key: for `begin`.
      title: of its progress.
      given: weights for `begin`. (What it holds itself becomes a part of the program, which weights would make large.)

    Raises:
      UserError: the data are others than those that the checkpoint was trained on.
    """
    layout = functools.partial(shardings, mesh=mesh)
    checkpoints = Checkpoints(folder / "checkpoints")
    meta: dict[str, Any] = {}
    if checkpoints.latest() is None:
        state = make_on_devices(begin, random_key, *given, shardings=layout)
    else:
        state, meta = checkpoints.restore(shapes_on_devices(begin, shardings=layout))
    if int(state.step) >= config.steps:
        return state
    data = batches(int(state.step))
    if meta.get("plan", data.hash) != data.hash:
        data.close()
        raise UserError(
            f"the data of {folder.parent} are not those of its checkpoint at step {int(state.step)} (plan "
            f"{meta['plan']}, now {data.hash}); put them back, or start another run"
        )
    return loop.run(
        step,
        state,
        lambda _: _sharded(data, mesh),
        config=config,
        checkpoints=checkpoints,
        log=MetricsLog(folder / "metrics.jsonl"),
        title=title,
        meta={"plan": data.hash},
    )


def _sharded(batches: Batches, mesh: jax.sharding.Mesh) -> Iterator[Any]:
    """Batches on the mesh; closing this ends the threads that read ahead.

    The loop asks for a batch while the devices are busy with up to two steps before it, and the transfer is only begun
    here: so batches come to the devices ahead of their steps, without a thread of their own.
    """
    with contextlib.closing(batches):
        for batch in batches:
            yield shard_batch(batch, mesh)
