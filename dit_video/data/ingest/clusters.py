"""Ingest by engines for clusters: each runs `write_part` on its workers, which need no disk in common.

SLURM, JobSet and other schedulers start processes: `tools/ingest.py --shard I --shards N`.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.storage import to_storage_path
from dit_video.data.ingest.engine import IngestConfig, RunParts, write_parts
from dit_video.data.ingest.parts import IngestFolder


def make_beam(runner: Any = None, options: Any = None) -> RunParts:
    """Return a function that writes parts by a pipeline of Apache Beam, with these options of `beam.Pipeline`."""

    def run(folder: IngestFolder, parts: Sequence[str], config: IngestConfig) -> None:
        import apache_beam as beam

        with _convert_errors("Apache Beam"), beam.Pipeline(runner=runner, options=options) as pipeline:
            write = functools.partial(write_part, str(folder.folder), config)
            _ = pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(write)

    return run


def make_ray(**options: Any) -> RunParts:
    """Return a function that writes parts by Ray Data, with these options of its `map`, such as `num_cpus`."""

    def run(folder: IngestFolder, parts: Sequence[str], config: IngestConfig) -> None:
        import ray

        destination = str(folder.folder)

        def write(row: dict[str, Any]) -> dict[str, Any]:
            write_part(destination, config, row["item"])
            return row

        with _convert_errors("Ray"):
            ray.data.from_items(list(parts), override_num_blocks=len(parts)).map(write, **options).materialize()

    return run


def write_part(destination: str, config: IngestConfig, part: str) -> None:
    """Write a part of a data set in a process of its own.

    Raises:
      UserError: see `write_parts`.
    """
    write_parts(IngestFolder(to_storage_path(destination), config.settings), [part], config=config, workers=1)


@contextlib.contextmanager
def _convert_errors(engine: str) -> Iterator[None]:
    """Convert the error of an engine, which quotes that of a worker, into one of a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # raised by the engine, or an RPC
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        fix = "Check its options and the logs of the workers, and start the command again."
        raise UserError(f"{engine} failed ({reason}). {fix}") from error
