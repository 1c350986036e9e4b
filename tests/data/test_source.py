"""Random access to ingested clips, and clips held out by name."""

import pickle

import numpy as np
import pytest

from dit_video.data import builder
from dit_video.data.ingest import ingest
from dit_video.data.source import ClipSource
from dit_video.errors import MissingError, UserError
from dit_video.video import Clip, decode


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    (root / "clips").mkdir()
    for index in range(4):
        frames = np.full((index + 1, 16, 16, 3), 60 * index, np.uint8)
        Clip(frames=frames, fps=8).save(root / "clips" / f"{index}.mp4")
        (root / "clips" / f"{index}.txt").write_text(f"clip {index}")
    ingest(root / "clips", root / "data")
    return root


def test_infos_and_bytes(dataset):
    source = ClipSource(dataset / "data")
    assert len(source) == 4
    assert [(info.name, info.caption, info.frames) for info in source.infos] == [
        (f"{i}.mp4", f"clip {i}", i + 1) for i in range(4)
    ]
    clip = decode(source[2])
    assert clip.frames.shape == (3, 16, 16, 3)
    assert abs(int(clip.frames.mean()) - 120) <= 2


def test_select_and_without_are_complements(dataset):
    source = ClipSource(dataset / "data")
    held_out, rest = source.select(["2.mp4", "0.mp4"]), source.without({"2.mp4", "0.mp4"})
    assert [info.name for info in held_out.infos] == ["0.mp4", "2.mp4"]
    assert [info.name for info in rest.infos] == ["1.mp4", "3.mp4"]
    assert held_out[1] == source[2]
    assert rest.without(["1.mp4"])[0] == source[3]
    assert len(source) == 4


@pytest.mark.parametrize("method", ["select", "without"])
def test_names_that_are_not_there(dataset, method):
    with pytest.raises(UserError, match=r"no clip named nine\.mp4 \(1 of 2 names\)"):
        getattr(ClipSource(dataset / "data"), method)(["0.mp4", "nine.mp4"])


def test_pickled_after_use(dataset):
    source = ClipSource(dataset / "data").without(["0.mp4"])
    first = source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.infos == source.infos
    assert copy[0] == first


def test_folders_that_hold_no_data_set(tmp_path):
    with pytest.raises(MissingError, match="no such data set"):
        ClipSource(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not an ingested data set"):
        ClipSource(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version"):
        ClipSource(tmp_path)
    with pytest.raises(UserError, match="not a readable TFDS data set"):
        builder.open_records(tmp_path)
    with pytest.raises(MissingError):
        builder.open_records(tmp_path / "nowhere")
