"""A cluster's way to build a data set, in Beam's in-process runner: the same bytes as without it.

Needs the `[beam]` extra, which wants other versions than constraints.txt has: `pip install -e '.[test,beam]'` into an
environment of its own.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from dit_video.data import builder
from dit_video.data.cluster import Beam
from dit_video.data.ingest import IngestConfig, ingest, workers
from dit_video.data.source import ClipSource
from dit_video.video import Clip

pytest.importorskip("apache_beam")

HERE = Path(__file__).parent


@pytest.fixture
def how(monkeypatch):
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # Beam reads them
    return Beam(runner=FnApiRunner(), options=PipelineOptions([]))


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(9):
        frames = np.random.default_rng(index).integers(0, 255, (3, 32, 32 + 16 * index, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / f"{index}.mp4")
        (folder / f"{index}.txt").write_text(f"clip {index}")
    (folder / "3.mp4").write_bytes(b"broken")
    return folder


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000, 1])
def test_the_same_bytes(clips, tmp_path, how, monkeypatch, shard_bytes):
    monkeypatch.setattr(builder, "SHARD_BYTES", shard_bytes)
    here = ingest(clips, tmp_path / "here")
    there = ingest(clips, tmp_path / "there", beam=how)
    assert here == there
    files = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "there").iterdir())
    assert [
        name for name in files if (tmp_path / "here" / name).read_bytes() != (tmp_path / "there" / name).read_bytes()
    ] == []
    shards = len([name for name in files if "array_record" in name])
    assert shards == {1 << 30: 1, 1: 8}.get(shard_bytes, shards)
    assert shard_bytes != 20_000 or 1 < shards < 8
    source = ClipSource(tmp_path / "there")
    assert [source[index] for index in range(8)] == [(clips / info.name).read_bytes() for info in source.infos]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips", "here", "there"]


def test_a_crash_in_a_decoder_does_not_end_the_pipeline(clips, tmp_path, how, monkeypatch):
    (tmp_path / "log").mkdir()
    (clips / "5.mp4").rename(clips / "5_crash.mp4")
    monkeypatch.setenv("DIT_VIDEO_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setattr(workers, "MODULE", "interrupted_worker")
    report = ingest(clips, tmp_path / "out", config=IngestConfig(time_limit=60), beam=how)
    assert [name for name, _ in report.quarantined] == ["3.mp4", "5_crash.mp4"]
    assert report.usable == 7
