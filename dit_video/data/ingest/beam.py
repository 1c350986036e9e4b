"""Clips inspected by a pipeline of Apache Beam, on as many machines as its runner has; needs the `[beam]` extra.

The machines must see the clips by the paths that they are listed with, and the folder of work: a shared file system.
Decoders run in processes of their own there too, so that a clip that crashes one is quarantined.

A worker writes every verdict into a part of the journal there, as soon as it is known. So a pipeline that is killed
loses no more than what was being decoded.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import apache_beam as beam

from dit_video.data.ingest.formats import Listed
from dit_video.data.ingest.inspection import Inspected, InspectionConfig
from dit_video.data.ingest.journal import PARTS, Journal, Part, read_parts
from dit_video.data.ingest.workers import Task, Workers
from dit_video.data.records.cluster import NOTE, Beam, note_errors, pipeline_errors


class _Inspect(beam.DoFn):
    """Takes lines of JSON, a clip each, and gives nothing: the verdicts are in the worker's part of the journal."""

    def __init__(self, folder: Path, settings: str, note: Path, config: InspectionConfig, time_limit: float | int):
        self._folder, self._settings, self._note = folder, settings, note
        self._config, self._time_limit = config, time_limit
        self._workers: Workers | None = None
        self._part: Part | None = None

    def setup(self):
        with note_errors(self._note):
            self._part = Part(self._folder, self._settings)
            self._workers = Workers(1, self._config, self._time_limit)

    def process(self, line: str) -> None:
        assert self._workers is not None
        assert self._part is not None
        name, captions, *place = json.loads(line)
        clip = Listed(name, tuple(captions), *place)
        with note_errors(self._note):
            for _, verdict in self._workers.inspect([(0, clip)]):
                self._part.put(clip, verdict)

    def finish_bundle(self):
        assert self._part is not None
        with note_errors(self._note):
            self._part.sync()

    def teardown(self):
        if self._workers is not None:
            self._workers.__exit__()
        if self._part is not None:
            self._part.close()


def inspect(
    clips: Sequence[Task], journal: Journal, how: Beam, config: InspectionConfig, time_limit: float | int
) -> Iterator[tuple[int, Inspected]]:
    """(number, verdict) of numbered clips, when the whole pipeline is done.

    Args:
      clips: what to inspect.
      journal: of the run; holds none of them.
      how: the runner.
      config: what is done with a clip.
      time_limit: see `Workers`.

    Raises:
      UserError: the pipeline failed; what its workers noted of it, or else what Beam says.
      OSError: a worker cannot write into the journal's folder.
    """
    folder = journal.folder
    listed, note = folder / "clips.jsonl", folder / NOTE
    listed.write_text("".join(json.dumps(clip) + "\n" for _, clip in clips), encoding="utf-8")
    with pipeline_errors(note), beam.Pipeline(runner=how.runner, options=how.options) as pipeline:
        _ = (
            pipeline
            | "List" >> beam.io.ReadFromText(str(listed))
            | "Spread" >> beam.Reshuffle()
            | "Inspect" >> beam.ParDo(_Inspect(folder, journal.settings, note, config, time_limit))
        )
    verdicts = read_parts(folder, journal.settings, (clip for _, clip in clips))
    for (number, _), verdict in zip(clips, verdicts, strict=True):
        # A shared disk may show a worker's last lines late: such a clip is tried again, as a lost one.
        yield number, verdict or Inspected("its worker left no verdict", passing=True)
    shutil.rmtree(folder / PARTS)
    listed.unlink()
