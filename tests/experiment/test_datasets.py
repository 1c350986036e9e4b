"""Links from a run folder to data sets and latents elsewhere, and progress of an ingest."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.core.storage import to_storage_path, write_text
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.experiment import datasets
from dit_video.experiment.latents import open_latents
from dit_video.experiment.run import Run
from dit_video.video import Clip
from dit_video.weights import load as load_weights
from dit_video.weights import save as save_weights


@pytest.fixture
def clips(tmp_path):
    (tmp_path / "clips").mkdir()
    for index in range(2):
        frames = np.full((2, 16, 16, 3), 90 * index, np.uint8)
        Clip(frames=frames, fps=8).save(tmp_path / "clips" / f"{index}.mp4")
    return tmp_path / "clips"


@pytest.fixture
def data(clips, memory):
    """Return the address of a data set made of the clips."""
    ingest(clips, f"{memory}/data")
    return f"{memory}/data"


def test_the_address_of_a_data_set_is_written_to_the_run_folder(clips, data, tmp_path):
    datasets.check_datasets([data])
    folder = tmp_path / "run" / "data"
    for spelled in (data, f"{data}/"):
        datasets.link_datasets(folder, [spelled])
    assert [path.name for path in folder.iterdir()] == ["address.json"]
    assert json.loads((folder / "address.json").read_text()) == data
    source = datasets.open_datasets(folder)
    assert source.infos == datasets.open_datasets(data).infos == ClipSource(data).infos
    assert [source[index] for index in range(2)] == [path.read_bytes() for path in sorted(clips.iterdir())]


def test_other_data_than_the_run_s_are_refused(clips, data, memory, tmp_path):
    ingest(clips, f"{memory}/other")
    ingest(clips, tmp_path / "here")
    datasets.link_datasets(tmp_path / "far", [data])
    for other in (f"{memory}/other", tmp_path / "here", clips):
        with pytest.raises(UserError, match=f"was started with the data set {data}, not {other}; name that one"):
            datasets.link_datasets(tmp_path / "far", [other])
    datasets.link_datasets(tmp_path / "near", [tmp_path / "here"])
    with pytest.raises(UserError, match=f"was started with the data set {tmp_path / 'here'}, not {data}"):
        datasets.link_datasets(tmp_path / "near", [data])
    assert (tmp_path / "near").is_symlink()


def test_a_run_links_to_local_and_remote_data_sets_together(clips, data, memory, tmp_path):
    folder = tmp_path / "run" / "data"
    for _ in range(2):
        datasets.link_datasets(folder, [clips, data])
    source = datasets.open_datasets(folder)
    assert [info.name for info in source.infos] == [f"{name}/{n}.mp4" for name in ("clips", "data") for n in (0, 1)]
    assert source[3] == source[1]
    datasets.link_datasets(tmp_path / "next" / "data", datasets.list_datasets(folder))  # a link of another run
    assert datasets.open_datasets(tmp_path / "next" / "data").infos == source.infos
    assert datasets.list_datasets(tmp_path / "next" / "data") == datasets.list_datasets(folder)
    with pytest.raises(UserError, match="two data sets are both named data"):
        datasets.link_datasets(tmp_path / "other", [data, f"{memory}/more/data/"])
    assert not (tmp_path / "other").exists()


def test_addresses_without_a_data_set_are_refused(clips, memory, tmp_path):
    write_text(to_storage_path(f"{memory}/raw/0.txt"), "a clip")
    for use in (datasets.check_datasets, lambda named: datasets.link_datasets(tmp_path / "data", named)):
        with pytest.raises(MissingError, match=f"no such data set: {memory}/none"):
            use([f"{memory}/none"])
        with pytest.raises(UserError, match=f"{memory}/raw is not an ingested data set; make one of clips on this"):
            use([f"{memory}/raw"])
        with pytest.raises(UserError, match="nonsense://x begins with nonsense://"):
            use(["nonsense://x"])
    assert not (tmp_path / "data").exists()


def test_a_folder_can_link_to_a_target_that_does_not_exist_yet(memory, tmp_path):
    for target in (tmp_path / "large disk", f"{memory}/latents"):
        folder = tmp_path / str(len(str(target)))
        datasets.link_folder(folder, target, "latents")
        datasets.link_folder(folder, target, "latents")
        assert str(datasets.resolve(folder)) == str(target)
        with pytest.raises(UserError, match=f"started with the latents {target}, not {tmp_path / 'else'}"):
            datasets.link_folder(folder, tmp_path / "else", "latents")
    datasets.link_folder(tmp_path / "own", tmp_path / "own", "latents")
    assert not (tmp_path / "own").is_symlink()


# Runs.


def test_an_ingested_data_set_is_used_where_it_lies(tiny, tiny_clips, tmp_path):
    ingest(tiny_clips, tmp_path / "ingested")
    started = Run.create(tmp_path / "run", tiny.EXPERIMENT)
    started.take(tmp_path / "ingested")
    started.take(tmp_path / "ingested")
    assert started.clips.infos == ClipSource(tmp_path / "ingested").infos
    assert (tmp_path / "run" / "data").is_symlink()
    ingest(tiny_clips, tmp_path / "other")
    with pytest.raises(UserError, match="was started with the data set"):
        started.take(tmp_path / "other")


@pytest.mark.slow
def test_data_and_latents_at_an_address_make_the_same_pipeline(tiny, tiny_run, tiny_clips, memory, tmp_path):
    ingest(tiny_clips, f"{memory}/data")
    started = Run.create(tmp_path / "run", tiny.EXPERIMENT)
    (tmp_path / "run" / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", tmp_path / "run" / "autoencoder")
    started.train(f"{memory}/data", latents=f"{memory}/latents")
    for stage in ("data", "latents"):
        assert [path.name for path in (tmp_path / "run" / stage).iterdir()] == ["address.json"]
    weights = (tmp_path / "run" / "pipeline" / "denoiser.safetensors").read_bytes()
    assert weights == (tiny_run / "pipeline" / "denoiser.safetensors").read_bytes()

    again = Run.open(tmp_path / "run")  # the address of the latents is remembered
    assert str(open_latents(again, again.folder / "latents").folder) == f"{memory}/latents"
    with pytest.raises(UserError, match=f"started with the latents {memory}/latents, not {memory}/other; name that"):
        again.train(f"{memory}/data", latents=f"{memory}/other")
    path = tmp_path / "run" / "autoencoder" / "weights.safetensors"
    other = load_weights(path)
    other["decoder_out"]["bias"] = other["decoder_out"]["bias"] + 1
    save_weights(path, other)
    with pytest.raises(UserError, match=f"{memory}/latents holds latents of autoencoder"):
        open_latents(again, again.folder / "latents")


def test_linked_latents_are_refused_if_the_run_caches_none_or_has_other_latents(tiny, tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run, tmp_path / "copy")
    with pytest.raises(UserError, match=f"started with the latents {copy / 'latents'}, not {tmp_path / 'x'}; name"):
        Run.open(copy).link_latents(tmp_path / "x")
    data = dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False)
    started = Run.create(tmp_path / "uncached", dataclasses.replace(tiny.EXPERIMENT, data=data))
    with pytest.raises(UserError, match="caches no latents"):
        started.link_latents(tmp_path / "x")


def test_progress_shows_how_many_files_are_read(capsys):
    with datasets.show_ingest_progress() as progress:
        for done in range(5):
            progress(done, 4)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("reading clips ") for line in lines)
    assert lines[-1].startswith("reading clips 4/4 (100%)")
    with datasets.show_ingest_progress() as progress:
        progress(0, 0)
    assert capsys.readouterr().err == ""
