"""The colour behind transparent pixels of training clips."""

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dit_video.core.errors import UserError
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents.plan import hash_inputs
from dit_video.data.sizes import SizeLimits, hash_clips, read_fitted_clip
from dit_video.data.tables import INDEX_FOLDER
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.experiment import DataConfig
from dit_video.tokens import Grid
from dit_video.video import Clip

NAMES = ["animation.webp", "opaque.png", "still.png", "video.mp4"]
TRANSPARENT = [True, False, True, False]
LIMITS = SizeLimits(max_pixels=256, max_frames=5, multiple=Grid(1, 8, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of red; the left half of those that are transparent is not there."""
    clips = tmp_path_factory.mktemp("clips")
    red = np.zeros((8, 16, 16, 4), np.uint8)
    red[..., 0], red[..., 3] = 200, 255
    Clip(frames=red[..., :3], fps=8).save(clips / "video.mp4")
    Image.fromarray(red[0]).save(clips / "opaque.png")
    red[..., :8, 3] = 0
    Image.fromarray(red[0]).save(clips / "still.png")
    for frame, green in enumerate(range(0, 160, 20)):
        red[frame, :, 8:, 1] = green  # or frames would be one
    images = [Image.fromarray(frame) for frame in red]
    images[0].save(clips / "animation.webp", save_all=True, append_images=images[1:], duration=125, lossless=True)
    return clips


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("ingested") / "data"
    ingest(folder, data)
    return data


def read_left(source, start=0):
    """Return the colour of the left half of each clip."""
    clips = (read_fitted_clip(source, index, LIMITS, start=start * (index == 0)) for index in range(4))
    return [tuple(clip.frames[0, 4, 4].tolist()) for clip in clips]


def test_the_table_tells_which_clips_are_transparent(dataset):
    source = ClipSource(dataset)
    assert [info.name for info in source.infos] == NAMES
    assert source.column("transparent").tolist() == TRANSPARENT
    assert [info.name for info in ClipSource(dataset, where="transparent").infos] == NAMES[::2]


@pytest.mark.parametrize(
    ("background", "expected"), [("black", (0, 0, 0)), ("white", (255, 255, 255)), ("file", (0, 0, 0))]
)
def test_transparent_clips_are_over_the_background(dataset, background, expected):
    source = ClipSource(dataset, background=background)
    left = read_left(source)
    assert left[::2] == [expected] * 2
    assert left[1] == (200, 0, 0)
    assert np.abs(np.subtract(left[3], (200, 0, 0))).max() <= 3


def test_random_backgrounds_differ_by_clip_and_part_and_are_the_same_again(dataset):
    source = ClipSource(dataset, background="random")
    first, second, later = read_left(source), read_left(source), read_left(source, start=2)
    assert first == second
    assert len({first[0], first[2], later[0]}) == 3
    assert first[1] == later[1] == (200, 0, 0)


def test_the_background_is_a_part_of_the_content_of_transparent_clips_alone(dataset):
    black, white, random = (ClipSource(dataset, background=name) for name in ("black", "#fff", "random"))
    assert black.list_contents() == black.column("payload")
    for other in (white, random):
        differs = [a != b for a, b in zip(black.list_contents(), other.list_contents(), strict=True)]
        assert differs == TRANSPARENT
    assert ClipSource(dataset, background="white").list_contents() == white.list_contents()
    for function in (hash_clips, lambda source: tuple(hash_inputs(source, ()))):
        assert len({function(each) for each in (black, white, random)}) == 3


def test_in_a_data_set_of_before_any_clip_may_be_transparent(dataset, tmp_path):
    old = shutil.copytree(dataset, tmp_path / "old")
    (index,) = (old / INDEX_FOLDER).glob("*.parquet")
    pq.write_table(pq.read_table(index).drop_columns(["transparent"]), index)
    source = ClipSource(old, background="white")
    assert read_left(source) == read_left(ClipSource(dataset, background="white"))
    assert all(" over " in content for content in source.list_contents())


@pytest.mark.parametrize("is_ingested", [True, False])
def test_clips_of_an_evaluation_are_over_its_background(folder, dataset, is_ingested):
    clips = open_clip_set(dataset if is_ingested else folder, background="teal")
    assert clips.names == tuple(NAMES)
    assert tuple(clips.read(2, None).frames[0, 4, 4].tolist()) == (0, 128, 128)


def test_files_have_no_random_background(folder):
    with pytest.raises(UserError, match="background='random' is invalid for files: ingest"):
        open_clip_set(folder, background="random")


def test_an_unknown_background_is_refused(dataset):
    for make in (lambda name: ClipSource(dataset, background=name), lambda name: make_data_config(background=name)):
        with pytest.raises(UserError, match="background='greenish' is invalid"):
            make("greenish")


def make_data_config(**options):
    return DataConfig(max_pixels=256, max_frames=5, **options)
