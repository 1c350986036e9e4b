"""Checkpoints of a training state: saved in the background, restored bit for bit, onto any mesh.

A checkpoint holds a nested dictionary of arrays, named by their paths in the state, and no type of Flax, optax or this
package. A JSON document is stored with the arrays: the number of the format, each array's shape, dtype and digest, the
metrics at the time of saving, the code version and metadata of the caller. (The trainer stores the resolved config and
the hash of the data plan, which together with the step is the whole state of the data.) Digests are verified after
reading, so lost or changed bytes are detected. A checkpoint is written to a temporary folder that is then renamed, so
that it is either complete or absent.
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
from dit_video.platform.provenance import get_code_version
from dit_video.training.checkpoint_policy import CheckpointPolicy, OrbaxPreservationPolicy

FORMAT = 1

_STORAGE_ERRORS = re.compile(
    r"OS error|No space left|File too large|Read-only|[Pp]ermission|[Qq]uota|RESOURCE_EXHAUSTED|PERMISSION_DENIED"
    r"|UNAVAILABLE|UNAUTHENTICATED|[Cc]redentials"
)
"""Messages of tensorstore if storage rejects a write; its errors have no types of their own."""
_ORBAX_FOLDER = os.path.dirname(ocp.__file__)

# Orbax reports each of its steps to the logger it shares with other packages, so its records are dropped by origin.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno >= logging.WARNING or not record.pathname.startswith(_ORBAX_FOLDER)
)


class Checkpoints:
    """The checkpoints of one run, in one folder, of which `keep` decides which are preserved.

    The folder is neither created nor changed before the first save.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: CheckpointPolicy = CheckpointPolicy()) -> None:  # noqa: B008  # it is frozen
        self.folder = _resolve_folder(folder)
        self.keep = keep
        self._writer: ocp.CheckpointManager | None = None
        self._unreadable: set[int] = set()
        self._writing_step = 0
        self._metrics: dict[int, Mapping[str, float] | None] = {}

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any], *, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Copy `state` (a tree of JAX arrays) to the host and write it in the background; it may be donated at once.

        Args:
          step: Number of steps that led to the state. Steps are saved in increasing order.
          state: Tree of JAX arrays.
          meta: Metadata that JSON can represent; tuples are restored as lists.
          metrics: Metrics by which the best checkpoints are selected.

        Raises:
          UserError: The folder already has a checkpoint of this step or a later one, or this or the previous save
            cannot be written (disk full, no permission, storage not reachable).
          TypeError: JSON cannot represent `meta`.
        """
        self.wait()
        with self._raise_user_errors(step):
            writer = self._open_writer()
            for unreadable in sorted(self._unreadable & set(writer.all_steps())):
                writer.delete(unreadable)
        self._unreadable.clear()
        newest = writer.latest_step()
        if newest is not None and newest >= step:
            raise UserError(
                f"cannot save step {step} to {self.folder}: the folder already has a checkpoint of step {newest}. "
                f"Continue from step {newest}, remove it, or use another folder."
            )
        arrays = trees.flatten(state)
        digests = _compute_digests(arrays)
        table = {path: {**_describe(array), "digest": digests[path]} for path, array in arrays.items()}
        self._metrics[step] = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        details = {"metrics": self._metrics[step], "code": get_code_version(), "meta": dict(meta)}
        document = json.loads(json.dumps({"format": FORMAT, "arrays": table, **details}))
        args = ocp.args.Composite(
            # Orbax cannot write an array without values; its shape and dtype are in the table.
            state=ocp.args.StandardSave(trees.unflatten({path: a for path, a in arrays.items() if a.size})),
            meta=ocp.args.JsonSave(document),
        )
        self._writing_step = step
        with self._raise_user_errors(step):
            saved = writer.save(step, args=args, force=True)
        if not saved:
            raise RuntimeError(f"the checkpoint of step {step} was not saved")

    def wait(self) -> None:
        """Wait until all saves are on disk, and raise their errors."""
        if self._writer is not None:
            with self._raise_user_errors(self._writing_step):
                self._writer.wait_until_finished()

    @contextlib.contextmanager
    def _raise_user_errors(self, step: int) -> Iterator[None]:
        """Turn errors of the disk or the remote storage into user errors. Earlier checkpoints are not affected."""
        try:
            yield
        except Exception as error:  # an OSError, or the orbax or tensorstore error that it was turned into
            is_jax_error = isinstance(error, jax.errors.JaxRuntimeError)  # such as the failure of another process
            if is_jax_error or not (isinstance(error, OSError) or _STORAGE_ERRORS.search(str(error))):
                raise
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.folder} ({_format_error(error)}). Earlier ones "
                "are intact: free disk space or grant write permission, then run the same command to resume."
            ) from error

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint that is not known to be unreadable, or None."""
        return max(self._list_steps(), default=None)

    def read_document(self, step: int) -> dict[str, Any]:
        """Return the JSON document of a checkpoint: `metrics`, `code` (see `code_version`), `meta` and `arrays`."""
        with self._open_reader() as reader:
            return reader.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, like: Any, step: int | None = None, *, config: Any = None) -> tuple[Any, dict[str, Any]]:
        """Read a state and its `meta`, of one step or of the newest checkpoint that can be read.

        Newer checkpoints that cannot be read (half written, damaged) are skipped with a warning, and removed by the
        next save.

        Args:
          like: Tree of `jax.ShapeDtypeStruct` with shardings, which gives the structure and the layout of the result.
            Leaves without a sharding are put on the first device.
          step: Step of the checkpoint; None for the newest that can be read.
          config: Resolved config of this run, as JSON. If the arrays do not match `like`, the error names the fields in
            which it differs from the config of the checkpoint, `meta["config"]`.

        Raises:
          MissingError: There is no checkpoint, or none of this step.
          UserError: The checkpoint has another config or format, or nothing can be read.
        """
        steps = sorted(self._list_steps(), reverse=True)
        if not steps or (step is not None and step not in steps):
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            has = f" Available steps: {', '.join(map(str, reversed(steps)))}." if steps else " Train first."
            raise MissingError(f"{which} in {self.folder}.{has}")
        problem: Exception | None = None
        for candidate in steps if step is None else [step]:
            try:
                result = self._read(candidate, like, config)
            except UserError:
                raise
            except Exception as error:  # orbax and tensorstore raise nearly every type for a damaged file
                problem = error
                if step is None:
                    self._unreadable.add(candidate)
                continue
            if problem is not None:
                warnings.warn(
                    f"checkpoint {', '.join(map(str, sorted(self._unreadable)))} in {self.folder} cannot be read "
                    f"({_format_error(problem)}); continuing from step {candidate}",
                    stacklevel=2,
                )
            return result
        which, reason = "any checkpoint" if step is None else f"step {step}", _format_error(problem)
        raise UserError(f"cannot read {which} in {self.folder} ({reason}). Remove the folder to restart.") from problem

    def _read(self, step: int, like: Any, config: Any) -> tuple[Any, dict[str, Any]]:
        document = self.read_document(step)
        checkpoint_path = self.folder / str(step)
        if document.get("format") != FORMAT:
            raise UserError(
                f"{checkpoint_path} has checkpoint format {document.get('format')}, but this version reads {FORMAT}. "
                "Use the version that wrote it."
            )
        expected = {path: _with_sharding(leaf) for path, leaf in trees.flatten(like).items()}
        fields = "" if config is None else config_json.describe_difference(document["meta"].get("config"), config)
        _check_arrays(checkpoint_path, document["arrays"], expected, fields)
        empty = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in expected.items() if 0 in leaf.shape}
        args = ocp.args.StandardRestore(trees.unflatten({path: s for path, s in expected.items() if path not in empty}))
        with self._open_reader() as reader:
            arrays = empty | trees.flatten(reader.restore(step, args=ocp.args.Composite(state=args)).state)
        for path, digest in _compute_digests(arrays).items():
            if digest != document["arrays"][path]["digest"]:
                raise ValueError(f"the digest of {path} does not match: its values were lost or changed after writing")
        return trees.map_with_path(lambda path, _: arrays[path], like), document["meta"]

    def _list_steps(self) -> set[int]:
        """Return the steps of complete checkpoints that are not known to be unreadable."""
        if not self.folder.is_dir():
            return set()
        self.wait()
        with self._open_reader() as reader:
            return set(reader.all_steps()) - self._unreadable

    @contextlib.contextmanager
    def _open_reader(self) -> Iterator[ocp.CheckpointManager]:
        """Yield the writing manager if there is one, else a temporary one with the folder's current contents."""
        if self._writer is not None:
            yield self._writer
            return
        manager = self._make_manager()
        try:
            yield manager
        finally:
            manager.close()

    def _open_writer(self) -> ocp.CheckpointManager:
        """Return the writing manager, which removes the remains of interrupted saves; only the run itself may do so."""
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = self._make_manager(
                preservation_policy=OrbaxPreservationPolicy(self.keep, self._get_metrics), cleanup_tmp_directories=True
            )
        return self._writer

    def _get_metrics(self, step: int) -> Mapping[str, float] | None:
        """Return the metrics stored with a checkpoint; None if its document cannot be read."""
        if step not in self._metrics:
            try:
                self._metrics[step] = self.read_document(step).get("metrics")
            except Exception:  # a damaged file, see `restore`
                self._metrics[step] = None
        return self._metrics[step]

    def _make_manager(self, **options: Any) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(create=False, **options),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
        )


def _resolve_folder(folder: str | os.PathLike) -> Path:
    """Return the path of a local folder, or of a URL such as gs://bucket/run that Orbax can write to.

    Raises:
      UserError: No package for such URLs is installed.
    """
    if "://" not in str(folder):
        return Path(folder).absolute()
    try:
        place = epath.Path(str(folder))
        place.exists()
    except (ImportError, KeyError, NotImplementedError, ValueError) as error:
        fix = "Install the package for such URLs, such as gcsfs for gs://, or use a local folder."
        raise UserError(f"cannot open {folder} ({_format_error(error)}). {fix}") from error
    return cast(Path, place)


def _compute_digests(arrays: Mapping[str, Array]) -> dict[str, int]:
    # One array at a time: on CPUs, concurrent multi-device programs may deadlock.
    return {path: int(_compute_digest(array)) for path, array in arrays.items()}


@jax.jit
def _compute_digest(array: Array) -> UInt32[Array, ""]:
    """Return the sum of the bits of all values, weighted by position, modulo 2^32: the same on every mesh."""
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


def _describe(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_arrays(folder: Path, stored: Mapping[str, Any], expected: Mapping[str, Any], config_difference: str) -> None:
    """Raise a user error with the first difference between the arrays of a checkpoint and those of the state.

    `config_difference` names the fields of the config that differ, or is empty.
    """
    differences = [f"it lacks {path}" for path in expected if path not in stored]
    differences += [f"it has {path}, which this run does not" for path in stored if path not in expected]
    for path, leaf in expected.items():
        here = _describe(leaf)
        there = {name: stored[path][name] for name in here} if path in stored else here
        if there != here:
            before, now = ("{dtype}{shape}".format_map(each) for each in (there, here))
            differences.append(f"{path} is {before} there and {now} here")
    if differences:
        count_note = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        config_note = f"; config: {config_difference}" if config_difference else ""
        details = f"{differences[0]}{count_note}{config_note}. Use the config of its run, or another folder."
        raise UserError(f"checkpoint {folder} has another config: {details}")


def _format_error(error: Exception | None) -> str:
    """Return the beginning of an error's message on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}{'…' if len(text) > 120 else ''}"
