"""Only the grids of a run are listed: none that is being written, and none outside of its folder."""

import json

import pytest

from dit_video.apps.run_page.grids import list_grids
from support.run_folders import write_grid


def test_grids_are_listed_by_step_with_their_tiles(tmp_path):
    for step in (200, 1000, 30):
        write_grid(tmp_path, step, texts=("a duck", "a fox", "<b>"))
    write_grid(tmp_path, 5, name="autoencoder", kind="reconstructions")
    (series,) = list_grids(tmp_path, "denoiser")
    assert [file.step for file in series.files] == [30, 200, 1000]
    assert (series.kind, series.size, series.tile_size) == ("samples", (16, 76), (16, 24))
    assert [tile.text for tile in series.tiles] == ["a duck", "a fox", "<b>"]
    assert series.tiles[2].left == 52
    url = series.get_url(series.files[0])
    assert url.startswith("/run/media/denoiser/samples/00000030.mp4?v=")
    write_grid(tmp_path, 30, texts=("a duck", "a fox", "<b>"))
    assert list_grids(tmp_path, "denoiser")[0].get_url(series.files[0]) == url
    assert list_grids(tmp_path, "denoiser")[0].files[0].version >= series.files[0].version
    (series,) = list_grids(tmp_path, "autoencoder")
    assert series.kind == "reconstructions"


def test_other_files_are_not_listed(tmp_path):
    write_grid(tmp_path, 10)
    folder = tmp_path / "denoiser" / "samples"
    for name in (".00000020.ab12.partial.mp4", "20.html", "x.mp4", "20.mp4.exe", "-1.mp4", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "30.mp4").mkdir()
    (series,) = list_grids(tmp_path, "denoiser")
    assert [file.path.name for file in series.files] == ["00000010.mp4"]
    assert list_grids(tmp_path, "autoencoder") == ()


def test_links_that_lead_out_of_the_run_are_not_listed(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "secret.mp4"
    outside.write_text("secret")
    write_grid(run, 10)
    folder = run / "denoiser" / "samples"
    (folder / "20.mp4").symlink_to(outside)
    (folder / "30.mp4").symlink_to(folder / "00000010.mp4")
    (folder / "40.mp4").symlink_to(run / "nowhere.mp4")
    (series,) = list_grids(run, "denoiser")
    assert [file.step for file in series.files] == [10, 30]
    write_grid(tmp_path / "other", 50, kind="x")
    (run / "autoencoder").mkdir()
    (run / "autoencoder" / "samples").symlink_to(tmp_path / "other" / "denoiser" / "x")
    assert list_grids(run, "autoencoder") == ()


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        "null",
        json.dumps({"height": 0, "width": 8, "tile_height": 8, "tile_width": 8, "tiles": []}),
        json.dumps({"height": 8, "width": 8, "tile_height": 8, "tile_width": 8, "tiles": [{"text": "x", "left": -1}]}),
        json.dumps({"height": 8, "width": 8, "tile_height": 8, "tile_width": "x", "tiles": []}),
        json.dumps({"height": 1e999, "width": 8, "tile_height": 8, "tile_width": 8, "tiles": []}),
    ],
)
def test_grids_without_valid_tiles_are_listed_without(tmp_path, document):
    path = write_grid(tmp_path, 10)
    path.with_name("tiles.json").write_text(document)
    (series,) = list_grids(tmp_path, "denoiser")
    assert (series.size, series.tiles) == (None, ())
