"""Replays of a run: the same bits, or what differs first."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.data.latents.cache import LatentSource
from dit_video.experiment.replay import replay
from dit_video.experiment.run import Run
from dit_video.training import step as training_step
from dit_video.training.hooks.hash_chain import CHAIN_FILE, read_chain
from support.devices import check_on_eight_devices
from support.interruptions import interrupt, wait_for_save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tiny_run, tmp_path):
    """Return a copy of the finished run."""
    return shutil.copytree(tiny_run, tmp_path / "run", symlinks=True)


@pytest.mark.nightly
def test_the_last_steps_of_a_run_have_the_same_bits(tiny_run):
    before, calls = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}, []
    result = replay(Run.open(tiny_run), progress=lambda done, total: calls.append((done, total)))
    assert (result.model, result.first, result.last, result.result) == ("denoiser", 8, 10, "same bits")
    assert result.difference is None
    assert result.compared_states == (10,)
    assert calls == [(1, 2), (2, 2)]
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before  # nothing is written
    assert not any(path.startswith(("devices", "mesh", "plan", "config")) for path, *_ in result.changes)


@pytest.mark.slow
def test_a_stretch_from_the_beginning_of_each_model_has_the_same_bits(tiny_run):
    for model, states in (("autoencoder", (4,)), ("denoiser", (4,))):
        result = replay(Run.open(tiny_run), model=model, first=0, last=5)
        assert (result.result, result.compared_states) == ("same bits", states)


@pytest.mark.slow
def test_a_run_that_was_killed_and_continued_replays_across_the_restart(tiny, tiny_run, copy, tiny_clips, monkeypatch):
    shutil.rmtree(copy / "pipeline")
    shutil.rmtree(copy / "denoiser")
    with monkeypatch.context() as patch:
        interrupt(patch, call=7, how="killed")
        with pytest.raises(KeyboardInterrupt):
            Run.create(copy, tiny.EXPERIMENT).train(tiny_clips)
    wait_for_save(copy / "denoiser", 4)
    Run.create(copy, tiny.EXPERIMENT).train(tiny_clips)
    whole, parts = (read_chain(folder / "denoiser" / CHAIN_FILE) for folder in (tiny_run, copy))
    assert sum("start" in record for record in parts) == 2
    strip = [[{**record, "link": ""} for record in records if "start" not in record] for records in (whole, parts)]
    assert strip[0] == strip[1]
    assert replay(Run.open(copy), first=0).result == "same bits"


def test_a_changed_record_is_refused(copy):
    chain = copy / "denoiser" / CHAIN_FILE
    lines = chain.read_text().splitlines(keepends=True)
    chain.write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(UserError, match="line 6 has the hash"):
        replay(Run.open(copy))


def test_stretches_that_do_not_exist_are_refused(tiny_run, copy):
    run = Run.open(tiny_run)
    for options, message in (
        ({"first": 3}, r"first=3 is invalid: .* Use one of 0, 8, 10"),
        ({"last": 11}, r"last=11 is invalid: the newest step of the hash chain is 10"),
        ({"first": 8, "last": 8}, r"last=8 is invalid: it must be above first=8"),
    ):
        with pytest.raises(UserError, match=message):
            replay(run, **options)
    with pytest.raises(MissingError, match=r"nobody/hash_chain.jsonl does not exist"):
        replay(run, model="nobody")


@pytest.mark.slow
def test_other_latents_are_named_at_the_step_that_reads_them(tiny_run, copy, monkeypatch):
    real = LatentSource.read_example

    def read_example(self, index):
        latents, fields = real(self, index)
        return latents + np.float32(index == 4), fields

    monkeypatch.setattr(LatentSource, "read_example", read_example)
    result = replay(Run.open(copy), first=0)
    assert result.result == "differs"
    assert result.difference is not None
    assert (result.difference.kind, result.difference.name) == ("batch", "tokens")


@pytest.mark.slow
def test_another_average_is_named_by_its_first_array(copy, monkeypatch):
    real = training_step.update_ema
    monkeypatch.setattr(
        training_step, "update_ema", lambda ema, params, step, *, decay: real(ema, params, step, decay=0.0)
    )
    result = replay(Run.open(copy), first=0)
    assert result.result == "differs"
    assert result.difference is not None
    assert (result.difference.step, result.difference.kind) == (4, "state")
    assert str(result.difference).startswith("array ema/")


@pytest.mark.slow
def test_another_learning_rate_is_named_by_the_loss_that_follows(tiny, copy):
    run = Run.open(copy)
    denoiser = run.experiment.denoiser
    optimizer = dataclasses.replace(denoiser.optimizer, learning_rate=denoiser.optimizer.learning_rate * 1.01)
    experiment = run.experiment.replace_stage("denoiser", optimizer=optimizer)
    result = replay(dataclasses.replace(run, experiment=experiment), first=0)
    assert result.result == "differs"
    assert result.difference is not None
    assert (result.difference.kind, result.difference.step) == ("loss", 2)
    assert [change.path for change in result.changes] == ["config.denoiser.optimizer.learning_rate"]


@pytest.mark.slow
def test_the_tool_prints_the_result_and_fails_where_the_run_differs(script, copy, monkeypatch):
    ended = script("tools/verify.py", copy, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["result"] == "same bits"
    real = training_step.update_ema
    monkeypatch.setattr(
        training_step, "update_ema", lambda ema, params, step, *, decay: real(ema, params, step, decay=0.0)
    )
    ended = script("tools/verify.py", copy)
    assert ended.code == 1
    assert "denoiser, steps 9 to 10: differs" in ended.out
    assert "first difference: array ema/" in ended.out
    ended = script("tools/verify.py", copy / "data")
    assert ended.code == 2
    assert "it has no experiment.json" in ended.err


@pytest.mark.slow
def test_other_numbers_of_devices_are_within_rounding(tiny_clips, tmp_path):
    check_on_eight_devices("replay_on_devices.py", str(tiny_clips), str(tmp_path / "run"))
