"""State of a run's folder: not begun, in training, silent, between two trainings, finished."""

import json
import os
import time

import pytest

from dit_video.apps.run_page.run_state import RunReader, format_duration, make_document
from support.run_folders import (
    write_checkpoint,
    write_config,
    write_entries,
    write_evaluation,
    write_grid,
    write_models,
)


def read(run):
    return RunReader(run).read()


def take_lock(run, name, *, seconds_ago=0.0):
    """Leave the file of the lock that a process takes when it starts."""
    path = run / name / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - seconds_ago,) * 2)


def test_a_run_that_has_not_begun(tmp_path):
    assert read(tmp_path / "nowhere").status == "new"
    write_config(tmp_path)
    state = read(tmp_path)
    assert (state.status, state.current, state.plan.title) == ("new", None, "ducks")
    assert [(each.plan.name, each.step, each.plan.steps) for each in state.trainings] == [
        ("autoencoder", 0, 20),
        ("denoiser", 0, 100),
    ]
    take_lock(tmp_path, "autoencoder")
    assert read(tmp_path).status == "starting"


def test_a_run_in_training(tmp_path):
    write_config(tmp_path)
    write_entries(tmp_path, 10, 20, name="autoencoder", end=time.time() - 500)
    take_lock(tmp_path, "denoiser", seconds_ago=300)
    write_entries(tmp_path, 10, 20, 30, pace=3.0)
    state = read(tmp_path)
    assert (state.status, state.status_text) == ("training", "training the denoiser")
    assert state.current is not None
    assert (state.current.plan.name, state.current.step) == ("denoiser", 30)
    assert state.current.compute_pace() == pytest.approx(3)
    assert state.current.estimate_seconds_left() == pytest.approx(70 * 3)


def test_the_pace_is_that_of_the_newest_process(tmp_path):
    write_config(tmp_path)
    now = time.time()
    write_entries(tmp_path, 10, 20, pace=1.0, end=now - 5000)
    write_entries(tmp_path, 30, pace=1.0, end=now - 100, first_step_seconds=50.0)
    assert read(tmp_path).trainings[1].compute_pace() == 1.0  # that of its steps, as it has one entry
    write_entries(tmp_path, 40, 50, pace=5.0, end=now)
    assert read(tmp_path).trainings[1].compute_pace() == pytest.approx(5)


def test_a_run_without_news_is_silent(tmp_path):
    write_config(tmp_path)
    take_lock(tmp_path, "denoiser", seconds_ago=4000)
    write_entries(tmp_path, 10, 20, 30, end=time.time() - 700, pace=5.0)
    state = read(tmp_path)
    assert (state.status, state.status_text) == ("silent", "no news of the denoiser for 12 min")
    slow = tmp_path / "slow"
    write_config(slow)
    write_entries(slow, 10, 20, 30, end=time.time() - 700, pace=30.0)  # an entry takes 5 minutes
    assert read(slow).status == "training"
    take_lock(tmp_path, "denoiser")
    assert read(tmp_path).status == "starting"


def test_a_run_between_two_trainings_and_an_autoencoder_alone(tmp_path):
    write_config(tmp_path)
    write_entries(tmp_path, 10, 20, name="autoencoder")
    assert read(tmp_path).status_text == "the autoencoder is trained; the denoiser has not begun"
    (tmp_path / "autoencoder" / "weights.safetensors").touch()
    (tmp_path / "latents").mkdir()
    later = time.time() + 1
    os.utime(tmp_path / "latents", (later, later))
    assert read(tmp_path).status_text == "the autoencoder is trained; latents are encoded for the denoiser"


def test_a_finished_run(tmp_path, tiny_run):
    write_config(tmp_path)
    write_entries(tmp_path, 10, 20, name="autoencoder")
    write_entries(tmp_path, 50, 100)
    assert read(tmp_path).status == "finished"
    state = read(tiny_run)
    assert state.status == "finished"
    assert [each.step for each in state.trainings] == [8, 10]
    assert [each.step for each in state.trainings[1].checkpoints] == [8, 10]
    for training in state.trainings:
        assert training.time_use.is_complete
        assert training.time_use.total > training.time_use.compilation > 0
        assert training.time_use.checkpoints > 0


def test_stages_of_a_curriculum_and_trainings_of_other_packages(tmp_path):
    write_config(
        tmp_path,
        curriculum=(("images", 30), ("small", 50)),
        others=({"type": "other:TrainPrior", "name": "prior", "steps": 7}, {"type": "other:Export", "name": "export"}),
    )
    write_entries(tmp_path, 4, name="prior")
    write_entries(tmp_path, 30, 60)
    write_entries(tmp_path, 3, name="extra")
    trainings = {each.plan.name: each for each in read(tmp_path).trainings}
    assert list(trainings) == ["autoencoder", "prior", "export", "denoiser", "extra"]
    assert [each.plan.steps for each in trainings.values()] == [20, 7, None, 180, None]
    plan = trainings["denoiser"].plan
    assert plan.find_stage(0) == "stage images (1 of 3), steps 0 to 30"
    assert plan.find_stage(60) == "stage small (2 of 3), steps 30 to 80"
    assert plan.find_stage(180) == "stage denoiser (3 of 3), steps 80 to 180"
    assert plan.averages == ("decay 0.999", "decay 0.9", "relative width 0.1", "no average")


def test_trainings_of_several_models(tmp_path):
    write_models(tmp_path, "prior", "Decoder")
    names = ["prior/autoencoder", "prior/denoiser", "Decoder/autoencoder", "Decoder/denoiser"]
    assert [each.plan.name for each in read(tmp_path).trainings] == names
    write_entries(tmp_path, 100, name="prior/denoiser", end=time.time() - 100)
    write_entries(tmp_path, 5, name="prior/extra", end=time.time() - 100)
    assert [each.plan.name for each in read(tmp_path).trainings] == [*names, "prior/extra"]
    write_entries(tmp_path, 10, name="Decoder/autoencoder")
    state = read(tmp_path)
    assert (state.status, state.status_text) == ("training", "training the autoencoder of Decoder")
    assert (state.trainings[1].is_done, state.trainings[2].plan.steps) == (True, 20)
    assert (state.plan.sampled, state.plan.nested) == ("Decoder/denoiser", ("prior", "Decoder"))
    write_checkpoint(tmp_path, 10, name="Decoder/denoiser")
    assert [each.step for each in read(tmp_path).trainings[3].checkpoints] == [10]
    take_lock(tmp_path, "Decoder/denoiser", seconds_ago=-1)
    assert read(tmp_path).status_text == "training of the denoiser of Decoder starts: loading and compiling"
    (tmp_path / "pipeline").mkdir()
    assert read(tmp_path).status == "finished"


def test_names_of_models_lead_to_no_folder_outside(tmp_path):
    write_models(tmp_path / "run", "prior", is_joined=False)
    path = tmp_path / "run" / "experiment.json"
    path.write_text(path.read_text().replace('"name": "prior"', '"name": ".."'))
    write_entries(tmp_path, 10, name="denoiser")
    assert read(tmp_path / "run").trainings == ()


@pytest.mark.parametrize("config", ["", "{", "[]", '{"experiment": 3}', '{"experiment": {"name": "x", "stages": 3}}'])
def test_a_config_that_cannot_be_read_hides_no_log(tmp_path, config):
    write_entries(tmp_path, 10)
    (tmp_path / "experiment.json").write_text(config)
    state = read(tmp_path)
    assert state.status == "training"
    assert [(each.plan.name, each.step, each.plan.steps) for each in state.trainings] == [("denoiser", 10, None)]


def test_the_document_of_a_state_is_json_with_all_parts(tmp_path):
    write_config(tmp_path)
    write_entries(tmp_path, 10, 20, validate_seconds=1.0, gradient_norm=None)
    write_grid(tmp_path, 20)
    write_checkpoint(tmp_path, 20)
    write_evaluation(tmp_path, 10, "sharpness", 3.5)
    write_evaluation(tmp_path, 20, "sharpness", None)
    reader = RunReader(tmp_path)
    document = json.loads(json.dumps(make_document(reader.read()), allow_nan=False))
    training = document["trainings"][1]
    assert (training["step"], training["steps"]) == (20, 100)
    assert training["values"]["loss"] == pytest.approx(10 / 21)
    assert training["values"]["gradient_norm"] is None
    assert training["evaluations"] == {"sharpness": [[10, 3.5]]}
    assert training["checkpoints"][0]["size"] == 2000
    assert training["grids"]["samples"][0]["step"] == 20
    assert json.loads(json.dumps(make_document(reader.read()))) == document


def test_durations_have_two_units_at_most():
    texts = [format_duration(float(seconds)) for seconds in (0, 0.52, 45, 600, 12_000, 7200, 200_000, 172_800)]
    assert texts == ["0 s", "0.5 s", "45 s", "10 min", "3 h 20 min", "2 h", "2 days 7 h", "2 days"]
