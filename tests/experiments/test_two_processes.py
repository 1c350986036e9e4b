"""Scripts of several processes, compared with one: all stages of training, fine-tuning and distillation."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dit_video
from dit_video.experiment.export import ADAPTER_FILE, LORA_FILE
from dit_video.experiment.monitors import tile_clips
from dit_video.sampling.pipeline import Request
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import read_metrics
from dit_video.video import decode
from support.devices import HANG, find_free_port, make_environment
from support.tiny_pipeline import read_captions_of_scenes
from support.tiny_wan import write_wan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red circle", "a blue square")


def run_in_two_processes(folder: Path, *command: object, devices: int = 1) -> list[str]:
    """Run a script in two processes of so many devices each, and return what they print."""
    port, processes = find_free_port(), []
    try:
        for index in range(2):
            place = {"COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index)}
            environment = {**make_environment(devices), **place, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
            environment["WANDB_MODE"] = "offline"
            line = [sys.executable, *map(str, command), "--patience.max-silence", "300"]
            with (folder / f"{index}.txt").open("w") as output:
                started = subprocess.Popen(line, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
            processes.append(started)
        codes = [process.wait(HANG) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [(folder / f"{index}.txt").read_text() for index in range(2)]
    assert codes == [0, 0], "\n".join(said)
    assert "report: " in said[0]
    assert "report: " not in said[1]
    return said


def test_two_processes_train_sample_and_report_what_one_does(tiny_clips, tiny_run, tmp_path):
    run = tmp_path / "run"
    command = ["experiments/train.py", "tests/support/tiny.py", "--data", tiny_clips, "--workdir", run]
    command += ["--monitoring.sample-every", "10", "--monitoring.prompts", *PROMPTS]
    command += ["--monitoring.evaluate-every", "5"]
    logged = importlib.util.find_spec("wandb") is not None
    command += ["--monitoring.wandb", "videos"] if logged else []
    run_in_two_processes(tmp_path, *command)
    assert len(list(run.glob("denoiser/wandb/offline-run-*"))) == logged  # the first process alone
    assert (run / "report.html").is_file()
    assert (run / "pipeline").is_dir()
    for stage in ("autoencoder", "denoiser"):
        alone, together = (read_metrics(folder / stage / "metrics.jsonl") for folder in (tiny_run, run))
        assert [entry["step"] for entry in together] == [entry["step"] for entry in alone]
        assert [entry["loss"] for entry in together] == pytest.approx([entry["loss"] for entry in alone], rel=1e-3)
    assert_samples_are_those_of_one_device(run, 10)
    # The first process measures step 5 while both train on, and the values are in a later entry.
    record = json.loads((run / "denoiser" / "evaluations" / "step_5" / "metrics.json").read_text())
    logged_values: dict = {}
    for entry in read_metrics(run / "denoiser" / "metrics.jsonl"):
        logged_values |= {name: value for name, value in entry.items() if name.startswith("evaluation_")}
    measured = {f"evaluation_{each['name']}" for each in record["results"] if each["value"] is not None}
    assert measured
    assert measured | {"evaluation_step"} == set(logged_values)


@pytest.mark.nightly
def test_context_over_two_processes_is_checked_without_a_false_alarm(tiny_clips, tmp_path):
    """Both have the same rows, of which the check compares one."""
    run = tmp_path / "run"
    command = ["experiments/train.py", "tests/support/tiny.py", "--data", tiny_clips, "--workdir", run]
    command += ["--monitoring.self-check", "--parallel.context", "2", "--parallel.context-attention", "ulysses"]
    run_in_two_processes(tmp_path, *command)
    problems = [json.loads(line) for line in (run / "denoiser" / "self_check.jsonl").read_text().splitlines()]
    assert not [problem for problem in problems if problem["check"] == "context_parallel"]


def assert_samples_are_those_of_one_device(run: Path, step: int) -> None:
    """Compare the clips that were sampled after the last step with those of the exported pipeline."""
    pipeline = dit_video.load(run)
    requests = [Request(prompt, pipeline.config.size, seed) for seed, prompt in enumerate(PROMPTS)]
    expected = run / "expected.mp4"
    tile_clips(pipeline.generate_many(requests)).save(expected)
    actual = decode(run / "denoiser" / "samples" / f"{step:08}.mp4").frames.astype(int)
    assert actual.std() > 1
    assert np.abs(actual - decode(expected).frames).mean() < 0.5  # of 255: video coding of pixels that differ by one


def test_two_processes_fine_tune_adapters_on_a_mesh(tmp_path):
    model, run = tmp_path / "wan", tmp_path / "run"
    write_wan(model)
    clips = shapes.write_folder(tmp_path / "clips", count=3, seed=0, sizes=(Grid(5, 32, 32), Grid(5, 32, 48)))
    sizes = ("--max-pixels", 32 * 48, "--max-frames", 5, "--dtype", "float32", "--batch", 2, "--steps", 4)
    options = ("--sampling-steps", 2, "--samples", 2, "--log-every", 1, "--warmup", 1, "--attention", "chunked")
    command = ("experiments/finetune.py", model, "--data", clips, "--workdir", run, *sizes, *options)
    run_in_two_processes(
        tmp_path, *command, "--parallel.data", 1, "--parallel.fsdp", 2, "--parallel.context", 2, devices=2
    )
    assert (run / ADAPTER_FILE).is_file()
    assert (run / LORA_FILE).is_file()
    assert len(list((run / "samples").glob("*.mp4"))) == 2
    pipeline = dit_video.load(run)
    assert pipeline.config.model.backbone.attention == "chunked"
    assert pipeline.generate("a red ball", size=(5, 16, 16), steps=1).frames.shape == (5, 16, 16, 3)


@pytest.mark.nightly
def test_two_processes_distil_a_student_on_a_mesh(tiny_run, tiny_clips, tmp_path):
    run = tmp_path / "student"
    options = ("--steps", 4, "--warmup", 1, "--log-every", 1, "--seeds", 1, "--full", 2, "--remat", "full")
    command = ("experiments/distill.py", tiny_run, "--data", tiny_clips, "--workdir", run, *options)
    run_in_two_processes(tmp_path, *command, "--parallel.fsdp", 2)
    assert len(read_metrics(run / "denoiser" / "metrics.jsonl")) == 4
    assert (run / "few_steps.json").is_file()
    pipeline = dit_video.load(run)
    assert pipeline.config.model.backbone.remat == "full"
    assert pipeline.generate("a red circle", size=(5, 16, 16)).frames.shape == (5, 16, 16, 3)


def test_two_processes_evaluate_as_one_does(tiny_run, tmp_path):
    pipeline = dit_video.load(tiny_run)
    pipeline.replace(config=read_captions_of_scenes(pipeline.config)).save(tmp_path / "model")
    command = ("experiments/evaluate.py", tmp_path / "model", "--protocol", "scenes", "--count", 12, "--steps", 2)
    alone, together = tmp_path / "alone", tmp_path / "together"
    subprocess.run([sys.executable, *map(str, command), "--out", str(alone)], check=True, cwd=ROOT, timeout=HANG)
    run_in_two_processes(tmp_path, *command, "--out", together)
    expected, actual = (json.loads((folder / "scenes" / "metrics.json").read_text()) for folder in (alone, together))
    assert (together / "scenes" / "report.html").is_file()
    for name in ("samples", "protocol", "skipped", "excluded", "nearest"):
        assert actual[name] == expected[name]
    assert list(actual["examples"]) == list(expected["examples"])
    for one, other in zip(expected["results"], actual["results"], strict=True):
        assert other["count"] == one["count"]
        # The sampled pixels differ by one.
        assert other["value"] == (None if one["value"] is None else pytest.approx(one["value"], rel=0.02))
