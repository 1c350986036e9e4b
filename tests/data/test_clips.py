"""Random access to ingested clips, and clips held out by name."""

import pickle

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.records import shards
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


def test_a_source_has_infos_and_bytes(dataset):
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
    held_out, rest = source.select(["2.mp4", "0.mp4"]), source.exclude({"2.mp4", "0.mp4"})
    assert [info.name for info in held_out.infos] == ["0.mp4", "2.mp4"]
    assert [info.name for info in rest.infos] == ["1.mp4", "3.mp4"]
    assert held_out[1] == source[2]
    assert rest.exclude(["1.mp4"])[0] == source[3]
    assert len(source) == 4


@pytest.mark.parametrize("method", ["select", "exclude"])
def test_unknown_names_are_refused(dataset, method):
    with pytest.raises(UserError, match=r"no clip named nine\.mp4 \(1 of 2 names\)"):
        getattr(ClipSource(dataset / "data"), method)(["0.mp4", "nine.mp4"])


def test_a_source_can_be_pickled_after_use(dataset):
    source = ClipSource(dataset / "data").exclude(["0.mp4"])
    first = source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.infos == source.infos
    assert copy[0] == first


def test_several_data_sets_can_be_one_source(dataset, tmp_path):
    (tmp_path / "clips").mkdir()
    Clip(frames=np.full((2, 16, 16, 3), 200, np.uint8), fps=8).save(tmp_path / "clips" / "0.mp4")
    ingest(tmp_path / "clips", tmp_path / "data")
    both = ClipSource({"dark": dataset / "data", "light": tmp_path / "data"})
    assert [info.name for info in both.infos] == [f"dark/{index}.mp4" for index in range(4)] + ["light/0.mp4"]
    assert both.dataset_sizes == (4, 1)
    alone = ClipSource(dataset / "data")
    assert [both[index] for index in range(4)] == [alone[index] for index in range(4)]
    assert both[4] == ClipSource(tmp_path / "data")[0]
    rest = pickle.loads(pickle.dumps(both.exclude(["dark/1.mp4", "dark/3.mp4"])))
    assert rest.dataset_sizes == (2, 1)
    assert rest[2] == both[4]
    light = pickle.loads(pickle.dumps(both.select_datasets([1])))
    assert light.dataset_sizes == (1,)
    assert [info.name for info in light.infos] == ["light/0.mp4"]
    assert light[0] == both[4]


def test_splits_are_sources_of_their_own(dataset):
    source = ClipSource(dataset / "data")
    source.infos = (*source.infos[:3], source.infos[3]._replace(split="test"))
    assert len(source.select_split("train")) == 3
    assert source.select_split("test")[0] == source[3]
    assert len(source.select_split("validation")) == 0


def test_folders_without_a_data_set_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no such data set"):
        ClipSource(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not an ingested data set"):
        ClipSource(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version"):
        ClipSource(tmp_path)
    with pytest.raises(UserError, match="not a readable TFDS data set"):
        shards.open_records(tmp_path)
    with pytest.raises(MissingError):
        shards.open_records(tmp_path / "nowhere")
