"""Encoding in several processes, as a user starts it."""

import shutil

import numpy as np
import pytest

from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents.cache import LatentSource
from dit_video.experiment.latents import open_latents
from dit_video.experiment.run import Run
from dit_video.video import Clip

TOOL = "tools/encode_latents.py"


def values(folder):
    source = LatentSource(folder)
    return {name: source[index] for index, name in enumerate(source.names)}


@pytest.mark.nightly
def test_two_processes_make_the_latents_of_a_run(tiny, tiny_run, tmp_path, script):
    options = ("--views-per-file", 4, "--shards", 2)
    arguments = (tiny_run, tiny_run / "data", tmp_path / "l", *options)
    unfinished = script(TOOL, *arguments, "--shard", 0, "--finish")
    assert unfinished.code == 2
    assert "encode the missing ones first" in unfinished.err
    first = script(TOOL, *arguments, "--shard", 1)
    assert first.code == 0, first.err
    assert "the last of 2 processes writes the index" in first.out
    assert "programs" in first.out
    assert "encoding latents" in first.err
    second = script(TOOL, *arguments, "--shard", 0)
    assert second.code == 0, second.err
    count = tiny.COUNT - tiny.HELD_OUT
    assert f"{count} examples of {count} clips" in second.out
    made, own = values(tmp_path / "l"), values(tiny_run / "latents")
    assert made.keys() == own.keys()
    for name, latents in made.items():
        np.testing.assert_allclose(latents, own[name], atol=2e-2)  # values are bfloat16, about 1
    # The training of the run accepts them.
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    shutil.rmtree(copy / "latents")
    shutil.copytree(tmp_path / "l", copy / "latents")
    assert len(open_latents(Run.open(copy), copy / "latents")) == count


def test_the_views_of_a_pipeline_are_chosen_on_the_command_line(tiny, tiny_run, tmp_path, script):
    done = script(
        TOOL, tiny_run / "pipeline", tiny_run / "data", tmp_path / "l", "--max-frames", 5, "--stretches", 2,
        "--flips", "True", "--resolutions", 256, "--storage", "float32", "--fps", 24,
    )  # fmt: skip
    assert done.code == 0, done.err
    source = LatentSource(tmp_path / "l")
    assert set(source.groups.tolist()) == set(range(tiny.COUNT))
    long = next(index for index, name in enumerate(source.names) if "16x16~flipped" in name)
    of_clip = [index for index, group in enumerate(source.groups) if group == source.groups[long]]
    assert len(of_clip) == 8  # two stretches, two resolutions, two ways round
    assert {source.sizes[index][0] for index in of_clip} == {2}
    assert source.identity["limits"] != LatentSource(tiny_run / "latents").identity["limits"]
    assert source.identity["limits"]["fps"] == 24
    assert source.identity["autoencoder"] == LatentSource(tiny_run / "latents").identity["autoencoder"]


@pytest.mark.nightly
def test_the_command_reads_and_writes_at_addresses(tiny, tiny_run, tiny_clips, memory, tmp_path, script):
    ingest(tiny_clips, f"{memory}/data")
    ignored = shutil.ignore_patterns("data", "latents", "denoiser", "pipeline")
    run = Run.open(shutil.copytree(tiny_run, tmp_path / "run", ignore=ignored))
    run.take(f"{memory}/data")
    run.link_latents(f"{memory}/latents")
    own = values(tiny_run / "latents")
    # Data and latents are named by the folders of a run or by their addresses.
    for data, destination in ((f"{memory}/data", f"{memory}/latents"), (run.folder / "data", run.folder / "latents")):
        done = script(TOOL, run.folder, data, destination)
        assert done.code == 0, done.err
        assert f"{memory}/latents: {len(own)} examples of {len(own)} clips" in done.out
    assert [path.name for path in (run.folder / "latents").iterdir()] == ["address.json"]
    made = values(f"{memory}/latents")
    assert made.keys() == own.keys()
    for name, latents in made.items():
        np.testing.assert_array_equal(latents, own[name])
    assert len(open_latents(run, run.folder / "latents")) == len(own)
    for data, destination in ((f"{memory}/none", f"{memory}/l"), (f"{memory}/data", "nonsense://l")):
        done = script(TOOL, run.folder, data, destination)
        assert done.code == 2
        assert len(done.err.strip().splitlines()) == 1
    done = script(TOOL, tiny_run / "pipeline", run.folder / "data", f"{memory}/all")
    assert done.code == 0, done.err
    assert len(LatentSource(f"{memory}/all")) == tiny.COUNT


@pytest.mark.nightly
def test_what_is_new_in_a_data_set_is_encoded_alone(tiny_run, tmp_path, script, monkeypatch):
    def add_clip(number):
        frames = np.random.default_rng(number).integers(0, 256, (5, 16, 32, 3), np.uint8)
        Clip(frames=frames, fps=8).save(tmp_path / "clips" / f"{number}.mp4")
        (tmp_path / "clips" / f"{number}.txt").write_text(f"caption {number}")

    def encode():
        """Bring data and latents up to date; return the names of the decoded clips, and the output."""
        ingest(tmp_path / "clips", tmp_path / "data")
        decoded.clear()
        done = script(TOOL, tiny_run / "pipeline", tmp_path / "data", tmp_path / "l")
        assert done.code == 0, done.err
        return set(decoded), done.out

    decoded, read = [], ClipSource.__getitem__
    monkeypatch.setattr(
        ClipSource,
        "__getitem__",
        lambda source, index: decoded.append(source.infos[index].name) or read(source, index),
    )
    (tmp_path / "clips").mkdir()
    for number in range(3):
        add_clip(number)
    first, output = encode()
    assert first == {"0.mp4", "1.mp4", "2.mp4"}
    assert "3 clips, 3 views, 1 files" in output
    before = values(tmp_path / "l")

    (tmp_path / "clips" / "1.txt").write_text("another caption")
    changed, output = encode()
    assert changed == set()
    assert "3 clips, 0 views, 0 files" in output
    assert LatentSource(tmp_path / "l").all_captions == (("caption 0",), ("another caption",), ("caption 2",))

    add_clip(3)
    added, output = encode()
    assert added == {"3.mp4"}
    assert "4 clips, 1 views, 1 files" in output
    assert "4 examples of 4 clips" in output
    after = values(tmp_path / "l")
    assert after.keys() == {*before, "3.mp4@0"}
    for name, latents in before.items():
        np.testing.assert_array_equal(after[name], latents)


def test_the_command_refuses_wrong_arguments_in_one_line(tiny_run, tmp_path, script):
    for arguments, message in (
        ((tiny_run, tiny_run / "data", tmp_path / "l", "--shard", 1), "Use both, or neither"),
        ((tiny_run, tiny_run / "data", tmp_path / "l", "--shard", 2, "--shards", 2), "shard=2 must be one of 0 to 1"),
        ((tiny_run, tmp_path / "no", tmp_path / "l"), "no such data set"),
        ((tmp_path / "no", tiny_run / "data", tmp_path / "l"), "no such file"),
        ((tiny_run, tiny_run / "data", tmp_path / "l", "--views-per-file", 0), "at least 1"),
        ((tiny_run, tiny_run / "data", tiny_run / "data"), "holds no latents"),
    ):
        done = script(TOOL, *arguments)
        assert done.code == 2
        assert message in done.err
        assert len(done.err.strip().splitlines()) == 1
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(tiny_run / "experiment.json", copy)
    done = script(TOOL, copy, tiny_run / "data", tmp_path / "l")
    assert done.code == 2
    assert "no trained autoencoder yet" in done.err
