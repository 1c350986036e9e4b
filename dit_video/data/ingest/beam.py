"""Inspection of clips by a pipeline of Apache Beam, on as many machines as its runner has; needs the extra `[beam]`.

The machines must see the clips and the work folder by the same paths: a shared file system. Decoders run in separate
processes there too, so that a clip that crashes a decoder is quarantined.

A worker writes every verdict into its part of the journal immediately, so that a pipeline that is killed loses only
the clips that were being decoded.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import apache_beam as beam

from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection, InspectionConfig
from dit_video.data.ingest.journal import PARTS_FOLDER, Journal, JournalPart, read_parts
from dit_video.data.ingest.workers import Task, Workers
from dit_video.data.records.cluster import ERROR_FILE, BeamOptions, raise_worker_errors, save_worker_errors


class _InspectDoFn(beam.DoFn):
    """A `DoFn` that takes clips as lines of JSON and writes verdicts into the worker's part of the journal."""

    def __init__(self, folder: Path, settings: str, note: Path, config: InspectionConfig, time_limit: float | int):
        self._folder, self._settings, self._note = folder, settings, note
        self._config, self._time_limit = config, time_limit
        self._workers: Workers | None = None
        self._part: JournalPart | None = None

    def setup(self):
        with save_worker_errors(self._note):
            self._part = JournalPart(self._folder, self._settings)
            self._workers = Workers(1, self._config, self._time_limit)

    def process(self, line: str) -> None:
        assert self._workers is not None
        assert self._part is not None
        name, captions, *location = json.loads(line)
        clip = ListedClip(name, tuple(captions), *location)
        with save_worker_errors(self._note):
            for _, verdict in self._workers.inspect([(0, clip)]):
                self._part.put(clip, verdict)

    def finish_bundle(self):
        assert self._part is not None
        with save_worker_errors(self._note):
            self._part.sync()

    def teardown(self):
        if self._workers is not None:
            self._workers.__exit__()
        if self._part is not None:
            self._part.close()


def inspect(
    clips: Sequence[Task], journal: Journal, beam_config: BeamOptions, config: InspectionConfig, time_limit: float | int
) -> Iterator[tuple[int, Inspection]]:
    """Yield (number, verdict) of numbered clips once the whole pipeline is done.

    Args:
      clips: clips to inspect.
      journal: journal of the run, which has no verdict on any of the clips.
      beam_config: runner and its options.
      config: configuration of the inspection.
      time_limit: see `Workers`.

    Raises:
      UserError: the pipeline failed; the message is the one that its workers noted, or else Beam's.
      OSError: a worker cannot write into the journal's folder.
    """
    folder = journal.folder
    clip_list, note = folder / "clips.jsonl", folder / ERROR_FILE
    clip_list.write_text("".join(json.dumps(clip) + "\n" for _, clip in clips), encoding="utf-8")
    with raise_worker_errors(note), beam.Pipeline(runner=beam_config.runner, options=beam_config.options) as pipeline:
        _ = (
            pipeline
            | "List" >> beam.io.ReadFromText(str(clip_list))
            | "Spread" >> beam.Reshuffle()
            | "Inspect" >> beam.ParDo(_InspectDoFn(folder, journal.settings, note, config, time_limit))
        )
    verdicts = read_parts(folder, journal.settings, (clip for _, clip in clips))
    for (number, _), verdict in zip(clips, verdicts, strict=True):
        # A shared disk may show a worker's last lines late: such a clip is inspected again, as after a lost process.
        yield number, verdict or Inspection("its worker left no verdict", transient=True)
    shutil.rmtree(folder / PARTS_FOLDER)
    clip_list.unlink()
