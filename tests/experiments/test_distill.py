"""The command that distills a run or a pipeline to a student of few steps, with a table and a report."""

import json

import pytest

import dit_video
from dit_video.diffusion import Lcm
from dit_video.experiment.export import LORA_FILE
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from support.tiny_wan import write_wan

pytestmark = pytest.mark.slow

COMMON = ["--log-every", 1, "--warmup", 1, "--seeds", 1, "--full", 3]


@pytest.mark.parametrize("method", ["consistency", pytest.param("dmd", marks=pytest.mark.nightly)])
def test_one_command_distills_a_run(script, tiny_run, tmp_path, method):
    options = ["--method", method, "--steps", 4, "--critic-steps", 2, *COMMON]
    ended = script("experiments/distill.py", tiny_run, "--workdir", tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    student = dit_video.load(tmp_path / "run").config
    assert (student.sampling.steps, student.sampling.guidance.get_scale("text")) == (4, 1.0)
    assert isinstance(student.sampling.solver, Lcm)
    table = json.loads((tmp_path / "run" / "few_steps.json").read_text())
    assert list(table) == [
        *("teacher, 3 steps", "teacher, 4 steps", "teacher, 2 steps", "teacher, 1 steps"),
        *("student, 4 steps", "student, 2 steps", "student, 1 steps"),
    ]
    assert ended.out.count("of the teacher's following and spread") == 7
    assert "few_steps" in (tmp_path / "run" / "report.html").read_text()
    # A repetition has nothing to do, and the student is the same.
    assert script("experiments/distill.py", tiny_run, "--workdir", tmp_path / "run", *options).code == 0
    assert json.loads((tmp_path / "run" / "few_steps.json").read_text()) == table


def test_one_command_distills_a_pipeline_on_rendered_clips(script, tiny_run, tmp_path):
    options = ["--steps", 2, "--clips", 30, *COMMON[:-4], "--seeds", 0]
    ended = script("experiments/distill.py", tiny_run / "pipeline", "--workdir", tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "run" / "clips").iterdir())) > 1
    assert not (tmp_path / "run" / "few_steps.json").exists()
    dit_video.load(tmp_path / "run").generate("a red circle", size=(1, 16, 16))


def test_one_command_distills_open_weights_to_an_adapter(script, tmp_path):
    write_wan(tmp_path / "wan")
    clips = shapes.write_folder(tmp_path / "clips", count=2, seed=0, sizes=(Grid(5, 32, 48),))
    options = ["--workdir", tmp_path / "run", "--steps", 2, "--lora.rank", 2, "--max-pixels", 32 * 48, *COMMON[:4]]
    options += ["--max-frames", 5, "--method", "dmd", "--critic-steps", 1, "--dtype", "float32"]
    without = script("experiments/distill.py", tmp_path / "wan", *options)
    assert (without.code, "use --data CLIPS" in without.err) == (2, True)
    ended = script("experiments/distill.py", tmp_path / "wan", *options, "--data", clips)
    assert ended.code == 0, ended.err
    assert str(tmp_path / "run" / LORA_FILE) in ended.out
    assert (tmp_path / "run" / "report.html").is_file()
    dit_video.load(tmp_path / "wan").load_lora(tmp_path / "run" / LORA_FILE)


def test_a_missing_teacher_is_named(script, tmp_path):
    ended = script("experiments/distill.py", tmp_path / "nowhere")
    assert ended.code == 2
    assert "nowhere" in ended.err
