import dataclasses
import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest

from dit_video.core import config_json, rng, trees
from dit_video.core.errors import UserError
from dit_video.data.buckets import BatchMemory, BucketConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents.cache import LatentSource
from dit_video.data.windows import Augmentation, ClipCrops, WindowConfig
from dit_video.experiment import autoencoder, input_pipeline
from dit_video.experiment.latents import open_latents
from dit_video.experiment.run import Run
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks import logging
from dit_video.training.trainer import Trainer
from dit_video.weights import load as load_weights
from dit_video.weights import save as save_weights


@pytest.fixture
def copy(tiny_run, tmp_path):
    """Return a copy of the finished run that a test may change."""
    return shutil.copytree(tiny_run, tmp_path / "run")


def content(folder):
    """Return the time of writing and the bytes of every file.

    A log of metrics is an exception, because it is written again when it is opened, and so is a lock.
    """
    return {
        path.relative_to(folder).as_posix(): (
            0 if path.name == "metrics.jsonl" else path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_leaves_all_its_files(tiny, tiny_run):
    expected = {
        "experiment.json",
        "pipeline.json",
        "data/table.json",
        "data/report.json",
        "autoencoder/metrics.jsonl",
        "autoencoder/preview.safetensors",
        "autoencoder/program.json",
        "autoencoder/weights.safetensors",
        "latents/table.json",
        "denoiser/metrics.jsonl",
        "denoiser/program.json",
        "pipeline/pipeline.json",
        "pipeline/autoencoder.safetensors",
        "pipeline/denoiser.safetensors",
        "pipeline/preview.safetensors",
    }
    files = content(tiny_run)
    assert expected <= files.keys()
    assert not [name for name in files if "partial" in name or name.endswith((".pkl", ".pickle"))]
    for stage, training in (("autoencoder", tiny.EXPERIMENT.autoencoder), ("denoiser", tiny.EXPERIMENT.denoiser)):
        entries = logging.read_metrics(tiny_run / stage / "metrics.jsonl")
        every = tiny.EXPERIMENT.log_every
        assert [entry["step"] for entry in entries] == [*range(every, training.steps, every), training.steps]
        assert all(np.isfinite(entry["loss"]) for entry in entries)
        assert ["program_kernel_calls" in entry for entry in entries] == [True] + [False] * (len(entries) - 1)
        assert Checkpoints(tiny_run / stage / "checkpoints").latest() == training.steps


def test_the_config_and_the_command_are_kept(tiny, tiny_run):
    opened = Run.open(tiny_run)
    assert opened.experiment == tiny.EXPERIMENT
    assert opened.command.startswith("python ")
    assert (
        config_json.from_json(json.loads((tiny_run / "experiment.json").read_text())["experiment"]) == tiny.EXPERIMENT
    )


def test_training_a_finished_run_again_recomputes_nothing(tiny, tiny_run, tiny_clips, copy):
    before = content(copy)
    run = Run.create(copy, tiny.EXPERIMENT)
    run.train(tiny_clips)
    assert content(copy) == before
    run.load_pipeline().save(copy / "again")
    for name in ("autoencoder.safetensors", "denoiser.safetensors"):
        assert (copy / "again" / name).read_bytes() == (tiny_run / "pipeline" / name).read_bytes()


def test_latents_are_those_of_the_training_clips_and_normalised(tiny, tiny_run):
    source, opened = LatentSource(tiny_run / "latents"), Run.open(tiny_run)
    held_out = set(tiny.EXPERIMENT.data.held_out)
    assert {info.name for info in opened.held_out_clips.infos} == held_out
    assert len(held_out) == tiny.HELD_OUT
    assert {name.split("@")[0] for name in source.names} == {info.name for info in opened.clips.infos} - held_out
    assert {Grid(*size) for size in source.sizes.tolist()} == {Grid(1, 2, 2), Grid(2, 2, 2), Grid(3, 2, 4)}
    values = np.concatenate([source[index].reshape(-1, 4) for index in range(len(source))])
    assert np.abs(values.mean(axis=0)).max() < 0.5
    assert 0.5 < values.std(axis=0).min() <= values.std(axis=0).max() < 1.5


@pytest.mark.slow
def test_the_linear_start_is_fitted_once_by_a_new_run_alone(tiny_run, copy, monkeypatch):
    fitted = []
    real = autoencoder.fit_linear
    monkeypatch.setattr(autoencoder, "fit_linear", lambda *args, **kwargs: fitted.append(1) or real(*args, **kwargs))
    (copy / "autoencoder" / "weights.safetensors").unlink()
    Run.open(copy).run_stages("autoencoder")  # from its last checkpoint
    assert fitted == []
    for name in ("autoencoder/weights.safetensors", "autoencoder/preview.safetensors"):
        assert (copy / name).read_bytes() == (tiny_run / name).read_bytes()
    shutil.rmtree(copy / "autoencoder")
    monkeypatch.setattr(Trainer, "run", lambda trainer, _: trainer.init(rng.key(0, "x")) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Run.open(copy).run_stages("autoencoder")
    assert fitted == [1]


def test_the_linear_start_is_fitted_on_clips_as_they_are(tiny, tiny_run, copy):
    experiment = tiny.EXPERIMENT
    windows = tuple(dataclasses.replace(window, augment=Augmentation()) for window in experiment.autoencoder.windows)
    augmented = experiment.replace_stage("autoencoder", windows=windows)
    (copy / "autoencoder" / "linear_4x8x8_4.safetensors").unlink()
    again = dataclasses.replace(Run.open(copy), experiment=augmented).linear_baseline()
    for left, right in zip(again, Run.open(tiny_run).linear_baseline(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_latents_of_another_autoencoder_are_refused(copy):
    path = copy / "autoencoder" / "weights.safetensors"
    weights = load_weights(path)
    weights["decoder_out"]["bias"] = weights["decoder_out"]["bias"] + 1
    save_weights(path, weights)
    with pytest.raises(UserError, match="Encode the clips again"):
        open_latents(Run.open(copy), copy / "latents")


# Folders without a run, or with another one.


def test_the_same_config_continues_and_another_is_refused(tiny, copy):
    assert Run.create(copy, tiny.EXPERIMENT).experiment == tiny.EXPERIMENT
    with pytest.raises(UserError, match=r"another config \(seed is 0 there and 1 here\)"):
        Run.create(copy, dataclasses.replace(tiny.EXPERIMENT, seed=1))
    (window,) = tiny.EXPERIMENT.autoencoder.windows
    other = dataclasses.replace(tiny.EXPERIMENT, name="a")
    other = other.replace_stage("autoencoder", windows=(dataclasses.replace(window, batch=5),))
    with pytest.raises(UserError, match=r"\(name is 'tiny' there and 'a' here, .*windows\[0\].batch is 4 there and 5"):
        Run.create(copy, other)


@pytest.fixture
def clips(tiny_clips, tmp_path):
    """Return a copy of the clips that a test may change."""
    return shutil.copytree(tiny_clips, tmp_path / "clips")


@pytest.mark.slow
def test_files_that_cannot_be_decoded_are_skipped_and_counted(tiny, clips, tmp_path, capsys):
    damaged, cut = sorted((clips / "clips").glob("*.mp4"))[:2]
    damaged.write_bytes(b"not a video at all")
    cut.write_bytes(cut.read_bytes()[:200])
    (clips / "clips" / "extra.mp4").write_bytes(b"")
    started = Run.create(tmp_path / "run", tiny.EXPERIMENT)
    started.take(clips)
    said = capsys.readouterr().err
    assert f"2 files cannot be decoded and are skipped, such as clips/{damaged.name}: " in said
    assert "1 files are not listed as clips by the source and are skipped" in said
    assert len(started.clips) == tiny.COUNT - 2
    assert len(json.loads((tmp_path / "run" / "data" / "report.json").read_text())["quarantined"]) == 2
    started.run_stages("autoencoder")
    started.experiment.denoiser.encode_latents(started)
    assert len(open_latents(started, started.folder / "latents")) == tiny.COUNT - 2 - tiny.HELD_OUT


def test_too_many_clips_that_are_too_small_end_the_run_before_it_trains(tiny, clips, tmp_path):
    name = sorted((clips / "clips").glob("*.png"))[0]
    shapes.render_example(0, seed=1, sizes=(Grid(1, 8, 16),)).save(name)
    with pytest.raises(UserError, match=f"1 of 21 clips .* clips/{name.name} has 8x16 pixels, less than one multiple"):
        Run.create(tmp_path / "run", tiny.EXPERIMENT).train(clips)
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_other_clips_than_the_run_s_are_refused(tiny, clips, copy):
    metadata = clips / "metadata.csv"
    before = metadata.read_text()
    first = sorted((clips / "clips").iterdir())[0]
    metadata.write_text(before.replace("circle", "ring"))
    changed = r"data was made of other files than the source has now: \d+ changed, such as clips/.*\(init_from\)"
    with pytest.raises(UserError, match=changed):
        Run.create(copy, tiny.EXPERIMENT).train(clips)
    metadata.write_text("".join(line for line in before.splitlines(True) if first.name not in line))
    shutil.copy(first, clips / "clips" / f"another{first.suffix}")
    first.unlink()
    with pytest.raises(UserError, match=rf"1 removed, such as clips/{first.name}"):
        Run.create(copy, tiny.EXPERIMENT).train(clips)


@pytest.mark.parametrize(
    ("steps", "message"), [(32, "latents of other clips or captions"), (10, "other clips, captions or values")]
)
def test_a_data_set_that_changed_is_refused_once_with_the_way_on(tiny, clips, copy, steps, message):
    """To encode the new clips would lead to the next refusal, as a run keeps its data; nothing is written before."""
    metadata = clips / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("circle", "ring"))
    shutil.rmtree(copy / "data")
    ingest(clips, copy / "data")
    before = (copy / "experiment.json").read_bytes()
    run = Run.create(copy, tiny.EXPERIMENT.replace_stage("denoiser", steps=steps))
    with pytest.raises(UserError, match=rf"{message} .*A run keeps its data: restore the clips, or start another"):
        run.train(copy / "data")
    assert (copy / "experiment.json").read_bytes() == before


def test_a_held_out_clip_that_does_not_exist_is_named(tiny, tiny_clips, tmp_path):
    data = dataclasses.replace(tiny.EXPERIMENT.data, held_out=("clips/nobody.mp4",))
    started = Run.create(tmp_path / "run", dataclasses.replace(tiny.EXPERIMENT, data=data))
    with pytest.raises(UserError, match=r"no clip named clips/nobody\.mp4"):
        started.train(tiny_clips)


# Parts of the stages.


@pytest.fixture
def two_windows(tiny, tiny_run):
    """Return a run with windows of two shapes."""
    windows = (WindowConfig(size=Grid(5, 16, 16), batch=2), WindowConfig(size=Grid(9, 16, 32), batch=1))
    return Run(folder=tiny_run, experiment=tiny.EXPERIMENT.replace_stage("autoencoder", windows=windows))


def open_windows(run, crops, start, purpose):
    return autoencoder.open_windows(run.experiment.autoencoder, crops, purpose, seed=run.seed, start=start)


def test_window_shapes_take_turns_and_continue_at_any_step(two_windows):
    stretches = ClipCrops(two_windows.training_clips, two_windows.experiment.limits)
    whole = list(itertools.islice(open_windows(two_windows, stretches, 0, "autoencoder"), 7))
    assert [batch.shape[:2] for batch in whole] == [(2, 5), (1, 9), (2, 5), (1, 9), (2, 5), (1, 9), (2, 5)]
    for start in (1, 2, 5):
        rest = list(itertools.islice(open_windows(two_windows, stretches, start, "autoencoder"), 7 - start))
        assert all(np.array_equal(*pair) for pair in zip(rest, whole[start:], strict=True))
    other = next(open_windows(two_windows, stretches, 0, "another purpose"))
    assert not np.array_equal(other, whole[0])


def test_clips_smaller_than_every_window_are_reported(two_windows, capsys):
    stretches = ClipCrops(two_windows.training_clips, two_windows.experiment.limits)
    two_windows.experiment.autoencoder.open_batches(two_windows, stretches, 0).close()
    images = sum(info.frames == 1 for info in two_windows.training_clips.infos)
    assert images
    assert f"{images} clips are smaller than a window" in capsys.readouterr().err


@pytest.mark.slow
def test_data_sets_are_mixed_by_weight(tiny, tiny_run, tiny_clips, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(tiny_clips, tmp_path / name)
    held_out = tuple(f"one/{name}" for name in tiny.EXPERIMENT.data.held_out)
    data = dataclasses.replace(tiny.EXPERIMENT.data, held_out=held_out, weights=(1.0, 3.0))
    started = Run.create(tmp_path / "run", dataclasses.replace(tiny.EXPERIMENT, data=data))
    with pytest.raises(UserError, match="weighs 2 data sets, 1 were given"):
        started.take(tmp_path / "one")
    with pytest.raises(UserError, match="both named one"):
        started.take(tmp_path / "one", tmp_path / "one")
    started.take(tmp_path / "one", tmp_path / "two")
    count = len(Run.open(tiny_run).clips)
    assert started.clips.dataset_sizes == (count, count)
    assert [info.name for info in started.held_out_clips.infos] == sorted(held_out)
    (tmp_path / "run" / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", tmp_path / "run" / "autoencoder")
    started.experiment.denoiser.encode_latents(started)
    latents = open_latents(started, started.folder / "latents")
    mixture = input_pipeline.make_mixture(latents, started.training_clips, data.weights)
    assert mixture.sizes == (count - len(held_out), count)
    assert mixture.weights == (1.0, 3.0)
    assert len(mixture.variants) == 2 * count - len(held_out)
    second = started.adapt(data=dataclasses.replace(data, weights=(0.0, 3.0)))
    assert second.training_clips.dataset_sizes == (count,)
    assert {info.name.partition("/")[0] for info in second.training_clips.infos} == {"two"}


def test_a_start_that_failed_can_be_corrected(tiny, tiny_clips, tmp_path):
    wrong = dataclasses.replace(tiny.EXPERIMENT.data, held_out=("clips/nobody.mp4",))
    with pytest.raises(UserError, match=r"no clip named clips/nobody\.mp4"):
        Run.create(tmp_path / "run", dataclasses.replace(tiny.EXPERIMENT, data=wrong)).train(tiny_clips)
    assert not (tmp_path / "run" / "autoencoder").exists()
    Run.create(tmp_path / "run", tiny.EXPERIMENT)
    assert Run.open(tmp_path / "run").experiment == tiny.EXPERIMENT
    (tmp_path / "run" / "autoencoder").mkdir()
    with pytest.raises(UserError, match="holds a run of another config"):
        Run.create(tmp_path / "run", dataclasses.replace(tiny.EXPERIMENT, data=wrong))


@pytest.mark.slow
def test_a_run_can_train_without_a_cache_of_latents(tiny, tiny_run, tiny_clips, tmp_path):
    data = dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False)
    started = Run.create(tmp_path / "run", dataclasses.replace(tiny.EXPERIMENT, data=data))
    started.take(tiny_clips)
    (tmp_path / "run" / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", tmp_path / "run" / "autoencoder")
    started.run_stages()
    params = started.load_pipeline().denoiser_params
    assert not (tmp_path / "run" / "latents").exists()
    summary = json.loads((tmp_path / "run" / "denoiser" / "rows.json").read_text())
    assert summary["examples"] == len(started.training_clips)
    assert all(np.isfinite(leaf).all() for leaf in trees.flatten(params).values())
    entries = logging.read_metrics(tmp_path / "run" / "denoiser" / "metrics.jsonl")
    assert all(0 <= entry["padding"] < 1 and entry["masked"] == 0 for entry in entries)


@pytest.mark.slow
def test_a_run_can_train_on_bucketed_batches(tiny, tiny_run, tiny_clips, tmp_path, capsys):
    data = dataclasses.replace(tiny.EXPERIMENT.data, cache_latents=False)
    buckets = BucketConfig(memory=BatchMemory(fixed=0, per_token=1), budget=24, count=2)
    experiment = dataclasses.replace(tiny.EXPERIMENT, data=data).replace_stage("denoiser", buckets=buckets)
    assert config_json.from_json(config_json.to_json(experiment)) == experiment
    with pytest.raises(UserError, match="buckets are read from video files"):
        dataclasses.replace(experiment, data=tiny.EXPERIMENT.data)
    started = Run.create(tmp_path / "run", experiment)
    started.take(tiny_clips)
    (tmp_path / "run" / "autoencoder").mkdir()
    shutil.copy(tiny_run / "autoencoder" / "weights.safetensors", tmp_path / "run" / "autoencoder")
    started.run_stages()
    params = started.load_pipeline().denoiser_params
    assert all(np.isfinite(leaf).all() for leaf in trees.flatten(params).values())
    summary = json.loads((tmp_path / "run" / "denoiser" / "rows.json").read_text())
    assert 1 <= len(summary["buckets"]) <= 2
    assert "0 dropped" in capsys.readouterr().err
    entries = logging.read_metrics(tmp_path / "run" / "denoiser" / "metrics.jsonl")
    assert all(entry["padding"] == 0 for entry in entries)


def test_the_defaults_of_a_pipeline_come_from_its_training_data(tiny, tiny_run):
    config = Run.open(tiny_run).pipeline_config()
    assert config.size == Grid(9, 16, 32)
    assert config.fps == 8.0
    assert config.provenance["seed"] == "0"
    assert config.provenance["experiment"] == "tiny"
    assert config.provenance["data"] == ClipSource(tiny_run / "data").versions[0]
    assert {"command", "jax", "dit_video"} <= config.provenance.keys()
