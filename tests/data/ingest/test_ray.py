"""Ingest by Ray Data on this machine: the data set has the same bytes as without it. Needs the `[ray]` extra."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import parts
from dit_video.data.ingest.clusters import make_ray
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.video import Clip

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Start a cluster of two processes on this machine."""
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_MIN_PART_BYTES", 1)
    folder = tmp_path / "clips"
    folder.mkdir()
    for index in range(6):
        frames = np.random.default_rng(index).integers(0, 255, (12, 32, 32 + 16 * index, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / f"{index}.mp4")
    (folder / "3.mp4").write_bytes(b"broken")
    return folder


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ray_writes_the_same_bytes(clips, tmp_path):
    config = IngestConfig(screening=ScreeningConfig(measure=True, max_clip_seconds=0.7, min_shot=0.2))
    here = ingest(clips, tmp_path / "here", config=config)
    there = ingest(clips, tmp_path / "there", config=config, run_parts=make_ray(num_cpus=1))
    assert here == there
    assert here.usable == 10
    assert read_files(tmp_path / "here") == read_files(tmp_path / "there")
    assert len(ClipSource(tmp_path / "there")) == 10
    assert ingest(clips, tmp_path / "there", config=config, run_parts=make_ray()).reused


def test_an_error_of_a_worker_is_one_line(clips, tmp_path, monkeypatch):
    def spoil(folder, names, config):
        (tmp_path / "out" / "index").write_text("in the way")
        make_ray()(folder, names, config)

    with pytest.raises(
        UserError, match=r"^[^\n]*out/index/train-0000\d\.parquet cannot be written \(File exists\); use"
    ):
        ingest(clips, tmp_path / "out", run_parts=spoil)
    (tmp_path / "out" / "index").unlink()
    with pytest.raises(UserError, match=r"^Ray failed \([^\n]*cpus[^\n]*\)\. Check its options and the logs[^\n]*$"):
        ingest(clips, tmp_path / "out", run_parts=make_ray(cpus=1))
    assert ingest(clips, tmp_path / "out").usable == 5
