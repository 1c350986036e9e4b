"""Clips inspected by a pipeline of Apache Beam, on as many machines as its runner has; needs the `[beam]` extra.

The machines must see the clips by the paths that they are listed with, and the folder of work: a shared file system.
Decoders run in processes of their own there too, so that a clip that crashes one is quarantined.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import apache_beam as beam

from dit_video.data.builder import Beam
from dit_video.data.ingest.inspection import Inspected, InspectionConfig
from dit_video.data.ingest.listing import Listed
from dit_video.data.ingest.workers import Task, Workers


class _Inspect(beam.DoFn):
    """Lines of (number, clip) to lines of (number, verdict)."""

    def __init__(self, config: InspectionConfig, time_limit: float | int):
        self._config, self._time_limit = config, time_limit
        self._workers: Workers | None = None

    def setup(self):
        self._workers = Workers(1, self._config, self._time_limit)

    def process(self, line: str) -> Iterator[str]:
        number, (name, captions, *place) = json.loads(line)
        assert self._workers is not None
        for _, verdict in self._workers.inspect([(number, Listed(name, tuple(captions), *place))]):
            yield json.dumps([number, verdict.to_json()])

    def teardown(self):
        if self._workers is not None:
            self._workers.__exit__()


def inspect(
    clips: Sequence[Task], folder: Path, how: Beam, config: InspectionConfig, time_limit: float | int
) -> Iterator[tuple[int, Inspected]]:
    """(number, verdict) of numbered clips, when the whole pipeline is done.

    Args:
      clips: what to inspect.
      folder: for work.
      how: the runner.
      config: what is done with a clip.
      time_limit: see `Workers`.
    """
    clips_file, verdicts = folder / "clips.jsonl", folder / "verdicts"
    for old in folder.glob("verdicts-*"):
        old.unlink()
    clips_file.write_text("".join(json.dumps(task) + "\n" for task in clips), encoding="utf-8")
    with beam.Pipeline(runner=how.runner, options=how.options) as pipeline:
        _ = (
            pipeline
            | "List" >> beam.io.ReadFromText(str(clips_file))
            | "Spread" >> beam.Reshuffle()
            | "Inspect" >> beam.ParDo(_Inspect(config, time_limit))
            | "Keep" >> beam.io.WriteToText(str(verdicts), file_name_suffix=".jsonl")
        )
    for path in sorted(folder.glob("verdicts-*")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                number, verdict = json.loads(line)
                yield number, Inspected.from_json(verdict)
