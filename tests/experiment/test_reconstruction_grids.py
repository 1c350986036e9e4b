"""Reconstructions of held-out clips while the autoencoder trains, which change nothing of its training."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from dit_video.core.errors import DecodeError
from dit_video.data.sizes import fit_size, read_fitted_clip
from dit_video.evaluation.metrics.reconstruction import psnr
from dit_video.experiment import monitors
from dit_video.experiment.run import Run
from dit_video.training.hooks.logging import read_metrics
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.video import decode
from support.interruptions import interrupt

pytestmark = pytest.mark.slow


def train(folder, experiment, clips):
    """Start or continue the training of the autoencoder."""
    run = Run.create(folder, experiment)
    run.take(clips)
    run.run_stages("autoencoder")
    return run


@pytest.fixture(scope="module")
def monitored(tiny, tiny_clips, tmp_path_factory):
    """Return a run with an autoencoder that was interrupted, with reconstructions every 3 of 8 steps."""
    experiment = dataclasses.replace(tiny.EXPERIMENT, monitoring=MonitoringConfig(sample_every=3))
    folder = tmp_path_factory.mktemp("monitored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, call=5, how="Ctrl-C")
        with pytest.raises(KeyboardInterrupt):
            train(folder, experiment, tiny_clips)
    assert not (folder / "autoencoder" / "weights.safetensors").exists()
    return train(folder, experiment, tiny_clips)


def test_the_training_is_that_without_reconstructions(monitored, tiny_run):
    name = "autoencoder/weights.safetensors"
    assert (monitored.folder / name).read_bytes() == (tiny_run / name).read_bytes()


def test_grids_hold_held_out_clips_next_to_their_reconstructions(monitored):
    folder = monitored.folder / "autoencoder" / "reconstructions"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("00000003.mp4", "00000006.mp4", "00000008.mp4"),
        "tiles.json",
    ]
    tiles = json.loads((folder / "tiles.json").read_text())
    clips, limits = monitored.held_out_clips, monitored.experiment.limits
    names = [info.name for info in clips.infos]
    sizes = {fit_size(clips.infos[names.index(tile["text"])], limits) for tile in tiles["tiles"]}
    assert len(sizes) == 1
    (size,) = sizes
    assert (tiles["tile_height"], tiles["tile_width"]) == (size.h, 2 * size.w + 2)
    codec = monitored.codec()
    frames = decode(folder / "00000008.mp4").frames
    assert frames.shape == (size.t, tiles["height"], tiles["width"], 3)
    values = []
    for tile in tiles["tiles"]:
        original = read_fitted_clip(clips, names.index(tile["text"]), limits)
        decoded = codec.reconstruct(original)
        values.append(psnr(original.frames, decoded.frames))
        for left, expected in ((0, original), (size.w + 2, decoded)):
            top, left = tile["top"], tile["left"] + left
            actual = frames[:, top : top + size.h, left : left + size.w]
            assert np.abs(actual.astype(int) - expected.frames).mean() < 12  # of 255: video coding of tiny frames
    entries = {entry["step"]: entry for entry in read_metrics(monitored.folder / "autoencoder" / "metrics.jsonl")}
    assert sorted(step for step in entries if "reconstruction_psnr" in entries[step]) == [3, 6, 8]
    # The normalizer was measured afterwards, which changes the last digits.
    assert entries[8]["reconstruction_psnr"] == pytest.approx(np.mean(values), rel=1e-4)
    assert entries[8]["reconstruct_seconds"] > 0


def test_clips_that_cannot_be_decoded_are_passed_over(monitored, tiny_clips, tmp_path, monkeypatch):
    """Damaged clips are left out, and without any the training goes on."""

    def fail(*_):
        raise DecodeError("damaged")

    monkeypatch.setattr(monitors, "read_fitted_clip", fail)
    folder = shutil.copytree(monitored.folder, tmp_path / "run")
    shutil.rmtree(folder / "autoencoder")
    train(folder, monitored.experiment, tiny_clips)
    assert not (folder / "autoencoder" / "reconstructions").exists()
    entries = read_metrics(folder / "autoencoder" / "metrics.jsonl")
    assert not any("reconstruction_psnr" in entry for entry in entries)
