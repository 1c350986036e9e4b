"""A run with remote checkpoints, from which another machine continues."""

import shutil

import pytest

from dit_video.core.errors import UserError
from dit_video.experiment.run import Run
from dit_video.training.checkpoint import Checkpoints
from dit_video.training.hooks import logging
from support.interruptions import interrupt


@pytest.mark.slow
def test_a_run_that_lost_its_folder_continues_from_remote_checkpoints(
    tiny, tiny_run, tiny_clips, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "bucket" / "run"
    first = Run.create(tmp_path / "first", tiny.EXPERIMENT)
    first.prepare(tiny_clips, checkpoints=elsewhere)
    first.run_stages("autoencoder")
    with monkeypatch.context() as patch:
        interrupt(patch, call=3, how="Ctrl-C")
        with pytest.raises(KeyboardInterrupt):
            first.train(tiny_clips)
    assert Checkpoints(elsewhere / "denoiser").latest() == 3
    assert not (tmp_path / "first" / "denoiser" / "checkpoints").exists()
    with pytest.raises(UserError, match=r"the run was started with the checkpoints .*bucket/run, not .*other"):
        first.train(tiny_clips, checkpoints=tmp_path / "other")
    shutil.rmtree(tmp_path / "first")

    again = Run.create(tmp_path / "again", tiny.EXPERIMENT)
    again.train(tiny_clips, checkpoints=elsewhere)
    for name in ("autoencoder/weights.safetensors", "pipeline/denoiser.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_run / name).read_bytes()
    assert logging.read_metrics(tmp_path / "again" / "denoiser" / "metrics.jsonl")[0]["step"] > 3
    with pytest.raises(UserError, match="has checkpoints of its autoencoder;"):
        Run.open(tiny_run).link_checkpoints(elsewhere)


def test_a_run_remembers_the_address_of_its_checkpoints(tiny, tmp_path, memory):
    run = Run.create(tmp_path / "run", tiny.EXPERIMENT)
    run.link_checkpoints(memory)
    run.link_checkpoints(memory)  # the same command again
    assert Run.open(tmp_path / "run").get_checkpoint_folder("denoiser") == f"{memory}/denoiser"
