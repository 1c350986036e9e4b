"""Checkpoints of a training state: saved in the background, restored bit for bit, onto any mesh.

A checkpoint holds a nested dictionary of arrays, named by their paths in the state, and no type of Flax, optax or this
package. Beside the arrays lies a JSON object: the format's number, every array's shape, dtype and digest, the metrics
when it was saved, the version of the code, and what the caller wants to keep (a training: the resolved config, and
with the step the whole state of the data, the hash of its plan). The digest is checked after reading: storage that lost
or changed bytes is noticed. A checkpoint is written beside its place and renamed: it is whole or absent.
"""

import contextlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, UInt32

from dit_video.core import config_json
from dit_video.core import trees as trees
from dit_video.core.errors import MissingError, UserError
from dit_video.platform.provenance import code_version
from dit_video.training.checkpoint_policy import Keep, Preservation

FORMAT = 1

_STORAGE = re.compile(
    r"OS error|No space left|File too large|Read-only|[Pp]ermission|[Qq]uota|RESOURCE_EXHAUSTED|PERMISSION_DENIED"
    r"|UNAVAILABLE|UNAUTHENTICATED|[Cc]redentials"
)
"""What tensorstore says of a place that doesn't take what is written: its errors have no kinds of their own."""
_ORBAX = os.path.dirname(ocp.__file__)

# Orbax reports each of its steps to the logger it shares with other packages, so its records are dropped by origin.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.WARNING or not record.pathname.startswith(_ORBAX)
)


class Checkpoints:
    """The checkpoints of one run, in one folder; `keep` says which stay. Nothing is touched before the first save."""

    def __init__(self, folder: str | os.PathLike, *, keep: Keep = Keep()) -> None:  # noqa: B008  # it is frozen
        self.folder = _place(folder)
        self.keep = keep
        self._writer: ocp.CheckpointManager | None = None
        self._unreadable: set[int] = set()
        self._writing = 0
        self._metrics: dict[int, Mapping[str, float] | None] = {}

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Copy `state` (a tree of JAX arrays) to the host and write it in the background; it may be donated at once.

        Args:
          step: how many steps made the state. Steps are saved in increasing order.
          meta: what JSON can hold; tuples come back as lists.
          metrics: by which the best checkpoints are known.

        Raises:
          UserError: the folder has a checkpoint of this step or a later one, which is not of this run's past; it, or
            the save before, can't be written (no room, no right, no way to it).
          TypeError: JSON cannot hold `meta`.
        """
        self.wait()
        with self._told(step):
            writer = self._open()
            for other in sorted(self._unreadable & set(writer.all_steps())):
                writer.delete(other)
        self._unreadable.clear()
        newest = writer.latest_step()
        if newest is not None and newest >= step:
            raise UserError(
                f"{self.folder} holds step {newest}, so step {step} cannot follow it; "
                f"continue from step {newest}, remove it, or use another folder"
            )
        arrays = trees.flatten(state)
        digests = _digests(arrays)
        table = {path: {**_kind(array), "digest": int(digests[path])} for path, array in arrays.items()}
        self._metrics[step] = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        told = {"metrics": self._metrics[step], "code": code_version(), "meta": dict(meta)}
        document = json.loads(json.dumps({"format": FORMAT, "arrays": table, **told}))
        args = ocp.args.Composite(
            # Orbax cannot write an array without values; its shape and dtype are in the table.
            state=ocp.args.StandardSave(trees.unflatten({path: a for path, a in arrays.items() if a.size})),
            meta=ocp.args.JsonSave(document),
        )
        self._writing = step
        with self._told(step):
            saved = writer.save(step, args=args, force=True)
        if not saved:
            raise RuntimeError(f"the checkpoint of step {step} was not saved")

    def wait(self) -> None:
        """Return when all saves are on disk; raise what went wrong with them."""
        if self._writer is not None:
            with self._told(self._writing):
                self._writer.wait_until_finished()

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Tell what a disk, or a place that takes the files, has against them. The checkpoints before stay."""
        try:
            yield
        except Exception as error:  # OSErrors, and what orbax and tensorstore make of them
            of_jax = isinstance(error, jax.errors.JaxRuntimeError)  # of another process, say
            if of_jax or not (isinstance(error, OSError) or _STORAGE.search(str(error))):
                raise
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({_line(error)}); those before it "
                "are intact: make room or give the right to write, and the same command goes on from them"
            ) from error

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None. One that `restore` found unreadable does not count."""
        return max(self._steps(), default=None)

    def document(self, step: int) -> dict[str, Any]:
        """What lies beside the arrays of a checkpoint: `metrics`, `code` (see `code_version`), `meta`, `arrays`."""
        with self._reader() as reader:
            return reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, like: Any, step: int | None = None, *, config: Any = None) -> tuple[Any, dict[str, Any]]:
        """Read the state and its `meta`: of one step, or of the newest that can be read.

        A newest checkpoint that cannot be read (half written, damaged) is passed over with a warning, and removed by
        the next save.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: the result has its structure and its layout. Leaves
            without a sharding go to the first device.
          config: the resolved config of now, as JSON. Where the arrays are not what `like` wants, the message names
            the fields in which it is not the checkpoint's, `meta["config"]`.

        Raises:
          MissingError: there is no checkpoint, or none of this step.
          UserError: the checkpoint is of another config or format, or nothing can be read.
        """
        steps = sorted(self._steps(), reverse=True)
        if not steps or (step is not None and step not in steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            has = f"; it has step {' and '.join(map(str, reversed(steps)))}" if steps else "; train first"
            raise MissingError(f"{which} in {self.folder}{has}")
        problem: Exception | None = None
        for candidate in steps if step is None else [step]:
            try:
                result = self._read(candidate, like, config)
            except UserError:
                raise
            except Exception as error:  # orbax and tensorstore raise nearly every kind for a damaged file
                problem = error
                if step is None:
                    self._unreadable.add(candidate)
                continue
            if problem is not None:
                warnings.warn(
                    f"checkpoint {', '.join(map(str, sorted(self._unreadable)))} in {self.folder} cannot be read "
                    f"({_line(problem)}); continuing from step {candidate}",
                    stacklevel=2,
                )
            return result
        which = f"step {step}" if step is not None else "any checkpoint"
        raise UserError(
            f"{which} in {self.folder} cannot be read ({_line(problem)}); remove the folder to start anew"
        ) from problem

    def _read(self, step: int, like: Any, config: Any) -> tuple[Any, dict[str, Any]]:
        document = self.document(step)
        where = self.folder / str(step)
        if document.get("format") != FORMAT:
            raise UserError(
                f"{where} is of checkpoint format {document.get('format')}, this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        wanted = {path: _placed(leaf) for path, leaf in trees.flatten(like).items()}
        fields = "" if config is None else config_json.difference(document["meta"].get("config"), config)
        _match(where, document["arrays"], wanted, fields)
        empty = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items() if 0 in leaf.shape}
        args = ocp.args.StandardRestore(trees.unflatten({path: s for path, s in wanted.items() if path not in empty}))
        with self._reader() as reader:
            arrays = empty | trees.flatten(reader.restore(step, args=ocp.args.Composite(state=args)).state)
        digests = _digests(arrays)
        for path, digest in digests.items():
            if int(digest) != document["arrays"][path]["digest"]:
                raise ValueError(f"{path} is not what was written")
        return trees.map_with_path(lambda path, _: arrays[path], like), document["meta"]

    def _steps(self) -> set[int]:
        """Complete checkpoints that are not known to be unreadable."""
        if not self.folder.is_dir():
            return set()
        self.wait()
        with self._reader() as reader:
            return set(reader.all_steps()) - self._unreadable

    @contextlib.contextmanager
    def _reader(self) -> Iterator[ocp.CheckpointManager]:
        """The manager that writes, if there is one; else one that sees the folder as it is now."""
        if self._writer is not None:
            yield self._writer
            return
        manager = self._manager()
        try:
            yield manager
        finally:
            manager.close()

    def _open(self) -> ocp.CheckpointManager:
        """The manager that writes. It clears what an interrupted save left, which only the run itself may do."""
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._manager(
                preservation_policy=Preservation(self.keep, self._metrics_of), cleanup_tmp_directories=True
            )
        return self._writer

    def _metrics_of(self, step: int) -> Mapping[str, float] | None:
        """What was measured when a checkpoint was saved; None where its document cannot be read."""
        if step not in self._metrics:
            try:
                self._metrics[step] = self.document(step).get("metrics")
            except Exception:  # as in `restore`
                self._metrics[step] = None
        return self._metrics[step]

    def _manager(self, **options: Any) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(create=False, **options),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )


def _place(folder: str | os.PathLike) -> Path:
    """A folder of this machine, or an address such as gs://bucket/run, which Orbax writes by itself.

    Raises:
      UserError: no package for such addresses.
    """
    if "://" not in str(folder):
        return Path(folder).absolute()
    try:
        place = epath.Path(str(folder))
        place.exists()
    except (ImportError, KeyError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"{folder} cannot be opened ({_line(error)}); install what reads such addresses, such as gcsfs for gs://, "
            "or use a folder"
        ) from error
    return cast(Path, place)


def _digests(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Of each array, one after the other: on CPUs, programs of several devices that run side by side may wait for each
    other for ever."""
    return {path: int(_digest(array)) for path, array in arrays.items()}


@jax.jit
def _digest(array: Array) -> UInt32[Array, ""]:
    """A sum of the bits of all values, weighted by position, modulo 2^32: the same on every mesh."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        words = array.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * position + 1), dtype=jnp.uint32)


def _kind(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _match(where: Path, given: Mapping[str, Any], wanted: Mapping[str, Any], fields: str) -> None:
    """Raise with the first difference between the arrays of a checkpoint and those of the state that is wanted.

    With the `fields` of the config that differ, where these are known.
    """
    differences = [f"it lacks {path}" for path in wanted if path not in given]
    differences += [f"it has {path}, which this run does not" for path in given if path not in wanted]
    for path, leaf in wanted.items():
        if path in given and (found := {name: given[path][name] for name in ("shape", "dtype")}) != _kind(leaf):
            now = _kind(leaf)
            differences.append(
                f"{path} is {found['dtype']}{found['shape']} there and {now['dtype']}{now['shape']} here"
            )
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        named = f"; of the config, {fields}" if fields else ""
        raise UserError(
            f"checkpoint {where} is of another config: {differences[0]}{more}{named}; "
            "use the run's own config or another folder"
        )


def _line(error: Exception | None) -> str:
    """The start of an error's message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}{'…' if len(text) > 120 else ''}"
