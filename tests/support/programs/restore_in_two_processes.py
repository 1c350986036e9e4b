"""Restore the newest checkpoint in two processes, one of which meets a fault; arguments are the folder and the fault.

`chunk` damages what the second process alone reads, `replica` its copy of an array that both hold, `transient` lets its
storage not answer, `once` does so for one attempt, `denied` denies it access, and `unseen` shows it the newest folder
only at its second look. `save` makes two checkpoints, and `replaced` saves the damaged one again. With `confused` the
second process does something else, and `numbered` lets JAX number the processes in another order than the service that
connects them.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from dit_video.core import storage
from dit_video.core.errors import UserError
from dit_video.distributed import Parallelism, make_mesh
from dit_video.training.checkpoint import Checkpoints
from support.devices import join_processes

storage.RETRY_SECONDS = (0.01, 0.01)
ERRORS = {
    "chunk": ValueError("DATA_LOSS: the chunk is damaged"),
    "replaced": ValueError("DATA_LOSS: the chunk is damaged"),
    "transient": ValueError("UNAVAILABLE: the service does not answer"),
    "once": TimeoutError("slow"),
    "denied": PermissionError(13, "Permission denied"),
}


def make_state(mesh: Any, value: float) -> dict[str, jax.Array]:
    """Return an array of which each process has a half, and one that both have."""
    noise = np.random.default_rng(0).normal(size=(8, 50_000)).astype(np.float32)  # so much is not kept in the index
    full = {"split": noise + np.float32(value), "same": np.full((16,), value, np.float32)}
    specs = {"split": PartitionSpec("fsdp"), "same": PartitionSpec()}
    return {
        name: jax.make_array_from_callback(full[name].shape, NamedSharding(mesh, specs[name]), full[name].__getitem__)
        for name in full
    }


def install(fault: str) -> None:
    """Let reads of this process fail."""
    restore, exists, calls = ocp.StandardCheckpointHandler.restore, Path.exists, []

    def fail(self, directory, *arguments, **keywords):
        if "2" in Path(directory).parts:
            calls.append(directory)
            if fault in ERRORS and not (fault == "once" and len(calls) > 1):
                raise ERRORS[fault]
        result = restore(self, directory, *arguments, **keywords)
        if fault == "replica" and "2" in Path(directory).parts:
            zeros = np.zeros((16,), np.float32)
            result["same"] = jax.make_array_from_callback((16,), result["same"].sharding, zeros.__getitem__)
        return result

    def hide(self, **keywords):
        if self.name == "2" and not calls:
            calls.append(self)
            return False
        return exists(self, **keywords)

    if fault == "unseen":
        Path.exists = hide  # type: ignore[method-assign]
    else:
        ocp.StandardCheckpointHandler.restore = fail


def main() -> None:
    """Join the processes, save or restore, and print the step or the error."""
    join_processes()
    folder, fault = sys.argv[1:]
    mesh = make_mesh(Parallelism(fsdp=2))
    checkpoints = Checkpoints(folder)
    if fault == "save":
        for step in (1, 2):
            checkpoints.save(step, make_state(mesh, step), {"step": step})
        checkpoints.wait()
        print("latest", checkpoints.latest())
        return
    if fault == "numbered":
        index = jax.process_index()
        jax.process_index = lambda: 1 - index  # type: ignore[assignment]
        print("restored nothing, latest", checkpoints.latest())
        return
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(mesh, 0))
    if jax.process_index() == 1:
        install(fault)
    try:
        if fault == "confused" and jax.process_index() == 1:
            checkpoints.latest()
            Checkpoints(folder).latest()
        state, meta = checkpoints.restore(like)
    except UserError as error:
        print("error", type(error).__name__, error.code, error)
        return
    except RuntimeError as error:
        print("error", error)
        return
    expected = make_state(mesh, meta["step"])
    exact = all(
        np.array_equal(mine.data, theirs.data)
        for name in state
        for mine, theirs in zip(state[name].addressable_shards, expected[name].addressable_shards, strict=True)
    )
    if fault == "replaced":
        for step in (2, 3):
            checkpoints.save(step, make_state(mesh, step), {"step": step})
        checkpoints.wait()
    print("restored", meta["step"], exact, "latest", checkpoints.latest())


if __name__ == "__main__":
    main()
