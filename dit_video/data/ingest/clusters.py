"""Ingest by engines for clusters: each runs `write_part` on its workers, which need no disk in common.

SLURM, JobSet and other schedulers start processes: `tools/ingest.py --shard I --shards N`.
"""

import contextlib
import functools
import importlib
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.storage import to_storage_path
from dit_video.data.ingest.engine import IngestConfig, RunParts, write_parts
from dit_video.data.ingest.parts import IngestFolder

_WORKER_ERROR = re.compile(r"dit_video\.core\.errors\.\w+: (.+?)(?: \[while running .*)?$", re.MULTILINE)
"""A `UserError` in the traceback of a worker, to which Beam adds a step's name."""


def make_beam(runner: Any = None, options: Any = None) -> RunParts:
    """Return a function that writes parts by a pipeline of Apache Beam, with these options of `beam.Pipeline`.

    Raises:
      UserError: If Apache Beam is not installed.
    """
    beam = _import_engine("Apache Beam", "apache_beam", "pip install -e '.[beam]' in a separate environment")

    def run(folder: IngestFolder, parts: Sequence[str], config: IngestConfig) -> None:
        with _convert_errors("Apache Beam"), beam.Pipeline(runner=runner, options=options) as pipeline:
            write = functools.partial(write_part, str(folder.folder), config)
            _ = pipeline | beam.Create(list(parts)) | beam.Reshuffle() | "write" >> beam.Map(write)

    return run


def make_ray(**options: Any) -> RunParts:
    """Return a function that writes parts by Ray Data, with these options of its `map`, such as `num_cpus`.

    Raises:
      UserError: If Ray is not installed.
    """
    ray = _import_engine("Ray", "ray", "pip install -e '.[ray]'")

    def run(folder: IngestFolder, parts: Sequence[str], config: IngestConfig) -> None:
        with _convert_errors("Ray"):
            rows = ray.data.from_items(list(parts), override_num_blocks=len(parts))
            rows.map(_write_row, fn_args=(str(folder.folder), config), **options).materialize()

    return run


def write_part(destination: str, config: IngestConfig, part: str) -> None:
    """Write a part of a data set in a process of its own.

    Raises:
      UserError: As `write_parts`.
    """
    write_parts(IngestFolder(to_storage_path(destination), config.settings), [part], config=config, workers=1)


def _write_row(row: dict[str, Any], destination: str, config: IngestConfig) -> dict[str, Any]:
    write_part(destination, config, row["item"])
    return row


def _import_engine(engine: str, module: str, fix: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"{engine} is not installed. Use {fix}.") from error


@contextlib.contextmanager
def _convert_errors(engine: str) -> Iterator[None]:
    """Convert an engine's error into one line: the error of a worker, which the engine quotes, or its own."""
    try:
        yield
    except Exception as error:  # raised by the engine, or an RPC; Ray's may be a UserError of many lines
        if quoted := _WORKER_ERROR.findall("".join(traceback.format_exception_only(error))):
            raise UserError(quoted[-1]) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        fix = "Check its options and the logs of the workers, and start the command again."
        raise UserError(f"{engine} failed ({reason}). {fix}") from error
