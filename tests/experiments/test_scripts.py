"""The scripts as a user starts them, most of them within this process, which is much faster."""

import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

import dit_video
from dit_video.core import config_json
from dit_video.core.storage import to_storage_path, upload
from dit_video.data.ingest.engine import ingest
from dit_video.diffusion import SOLVERS
from dit_video.experiment.remote_folder import RemoteFolder
from dit_video.experiment.run import Run
from dit_video.sampling.pipeline import Pipeline, Request
from dit_video.scenes import shapes, shapes_evaluation
from dit_video.tokens import Grid
from dit_video.video import decode

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests/support/tiny.py"
PROMPT = "a red circle moving left"
REQUESTS = [
    Request(PROMPT, Grid(9, 16, 32), seed=1),
    Request("a blue square", Grid(1, 16, 16), seed=2),
    Request("a white triangle moving up", Grid(5, 16, 16), seed=3),
]


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def few_samples(monkeypatch):
    """Restrict evaluations to three samples instead of all 162."""
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: REQUESTS)


def assert_one_line(ended, message):
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    assert message in ended.err


# sample.py


def test_sample_writes_a_file(process, tiny_run, tmp_path):
    out = tmp_path / "clip.mp4"
    ended = process(
        "experiments/sample.py", tiny_run, "--prompt", PROMPT, "--size", "5x16x16", "--seed", 3, "--out", out
    )
    assert ended.code == 0, ended.err
    assert re.fullmatch(rf"{re.escape(str(out))}: 5 frames of 16x16, \d+\.\d s including loading\n", ended.out)
    assert "Traceback" not in ended.err
    assert decode(out).frames.shape == (5, 16, 16, 3)


@pytest.mark.slow
def test_sample_writes_the_clips_of_a_list_of_prompts(script, tiny_run, tmp_path):
    listed = [
        {"prompt": PROMPT, "frames": 9, "height": 16, "width": 32, "seed": 1},
        {"prompt": "a blue square", "frames": 1, "height": 16, "width": 16},
    ]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    ended = script(
        "experiments/sample.py", tiny_run, "--prompts", tmp_path / "list.json", "--out", tmp_path / "out", "--steps", 1
    )
    assert ended.code == 0, ended.err
    assert ended.out == f"2 clips, prompts.json and contact_sheet.png in {tmp_path / 'out'}\n"
    written = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert [{**entry, "file": None} for entry in written] == [{"seed": 0, **entry, "file": None} for entry in listed]
    for entry in written:
        size = (entry["frames"], entry["height"], entry["width"], 3)
        assert decode(tmp_path / "out" / entry["file"]).frames.shape == size


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["gif", "webm", "apng"])
def test_sample_writes_other_formats(script, tiny_run, tmp_path, suffix):
    out = tmp_path / f"clip.{suffix}"
    assert script("experiments/sample.py", tiny_run, "--prompt", PROMPT, "--size", "5x16x16", "--out", out).code == 0
    assert decode(out).frames.shape == (5, 16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", PROMPT, "--size", "17x32"], "--size 17x32 is invalid: it must be FRAMESxHEIGHTxWIDTH"),
        (["--prompt", PROMPT, "--size", "big"], "--size big is invalid: it must be FRAMESxHEIGHTxWIDTH"),
        (["--prompt", PROMPT, "--size", "8x16x16"], "T=8 is not 1 + 4k for temporal stride 4; use 5 or 9"),
        (["--prompt", PROMPT, "--size", "5x16x24"], "width 24 is not divisible by 16"),
        (["--prompt", PROMPT, "--solver", "plms"], "unknown solver 'plms'; use one of ddim, ddpm"),
        (["--prompt", PROMPT, "--steps", "0"], "--steps 0 is invalid: it must be at least 1"),
        (["--prompt", PROMPT, "--shift", "0"], "shift=0.0 is invalid"),
        (["--prompt", PROMPT, "--times", "1", "0.5", "--steps", "3"], "steps=3 is invalid: times are of 2 steps"),
        (["--prompt", PROMPT, "--parallel", "pipeline=2"], "--parallel pipeline=2 is invalid: it must be AXIS=SIZE"),
        (["--prompt", PROMPT, "--parallel", "data=3"], "data=3 does not divide the 1 devices"),
        (["--prompt", PROMPT, "--rescale", "2"], "rescale=2.0 is invalid: it must lie in [0, 1]"),
        (["--prompt", PROMPT, "--interval", "0.8", "0.2"], "interval=(0.8, 0.2) is invalid"),
        (["--prompt", PROMPT, "--prompts", "list.json"], "use --prompt TEXT or --prompts FILE"),
        ([], "exactly one of --prompt, --prompts and the name of a task is needed"),
        (["--prompts", "nowhere.json"], "no such file: nowhere.json"),
        (
            ["--prompts", "nowhere.json", "--resample", "2"],
            "--image and other options of one clip need --prompt",
        ),
    ],
)
def test_sample_explains_wrong_arguments_in_one_line(script, tiny_run, tmp_path, arguments, message):
    assert_one_line(script("experiments/sample.py", tiny_run, "--out", tmp_path / "clip.mp4", *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_sample_refuses_an_unknown_format_before_it_samples(script, tiny_run, tmp_path):
    ended = script("experiments/sample.py", tiny_run, "--prompt", PROMPT, "--out", tmp_path / "clip.avi")
    assert_one_line(ended, "clip.avi has no known suffix; use one of .mp4")


@pytest.mark.parametrize(
    ("out", "size", "message"),
    [
        ("file/clip.mp4", "5x16x16", "clip.mp4 cannot be written (File exists); use a path in a writable folder"),
        ("folder.mp4", "5x16x16", "folder.mp4 is a folder; use the path of a file"),
        ("/proc/clip.mp4", "5x16x16", "/proc/clip.mp4 cannot be written"),
        ("five.png", "5x16x16", "5 frames are invalid for png: use one frame"),
        ("five.jpg", "5x16x16", "5 frames are invalid for jpg: use one frame"),
    ],
)
def test_sample_knows_that_its_result_cannot_be_written(script, tiny_run, tmp_path, monkeypatch, out, size, message):
    """Sampling may take an hour."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr(Pipeline, "run_many", lambda *arguments, **options: pytest.fail("something was sampled"))
    out = tmp_path / out
    assert_one_line(
        script("experiments/sample.py", tiny_run, "--prompt", PROMPT, "--size", size, "--out", out), message
    )
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.mp4"}


def test_a_folder_that_cannot_be_written_is_known_before_the_weights_are_read(script, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "prompts.txt").write_text("a red circle")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.md").touch()
    monkeypatch.setattr(dit_video, "load", lambda *arguments, **options: pytest.fail("weights were read"))
    prompts = "--prompts", tmp_path / "prompts.txt"
    for options, folder, message in (
        (("experiments/sample.py", tiny_run, *prompts), "file/x", "cannot be written"),
        (("experiments/sample.py", tiny_run, *prompts), "notes", "holds other files than samples"),
        (("experiments/evaluate.py", tiny_run), "file/x", "cannot be written"),
        (("experiments/evaluate.py", tiny_run, "--protocol", "task_loop"), "file/x", "cannot be written"),
    ):
        assert_one_line(script(*options, "--out", tmp_path / folder), message)


def test_sample_names_a_run_that_does_not_exist(script, tmp_path):
    ended = script("experiments/sample.py", tmp_path / "nowhere", "--prompt", PROMPT, "--out", tmp_path / "clip.mp4")
    assert_one_line(ended, f"no such run: {tmp_path / 'nowhere'}")


def test_sample_and_evaluate_refuse_a_folder_that_is_no_run(script, tmp_path):
    ended = script("experiments/sample.py", tmp_path, "--prompt", PROMPT, "--out", tmp_path / "clip.mp4")
    assert_one_line(ended, "holds neither pipeline.json nor experiment.json")
    assert_one_line(script("experiments/evaluate.py", tmp_path), "holds neither")


# evaluate.py


def test_evaluate_writes_the_metrics_and_the_report_of_a_run(script, copy, few_samples):
    ended = script("experiments/evaluate.py", copy, "--seed", 5, "--steps", 1, "--solver", "heun")
    assert ended.code == 0, ended.err
    metrics = json.loads((copy / "metrics.json").read_text())
    protocol = metrics["protocol"]
    assert protocol["config"]["seed"] == 5
    assert protocol["sampling"]["solver"] == config_json.to_json(SOLVERS["heun"])
    results = {entry["name"]: entry for entry in metrics["results"]}
    for name in ("colour", "shape", "direction"):
        assert f"{name} as prompted: {results[name]['value']:.1%} (" in ended.out
    assert f"PSNR: {results['psnr']['value']:.2f} dB (" in ended.out
    assert f"SSIM: {results['ssim']['value']:.4f} (" in ended.out
    assert f"report: {copy / 'report.html'}" in ended.out
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "1 steps of heun" in page
    assert f"sample.py {copy} --prompt" in page


def test_evaluate_writes_the_figures_of_a_pipeline_to_another_folder(script, tiny_run, tmp_path, few_samples):
    alone = shutil.copytree(tiny_run / "pipeline", tmp_path / "shapes")
    assert_one_line(script("experiments/evaluate.py", alone), "use --out FOLDER")
    ended = script("experiments/evaluate.py", alone, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "report.html", "samples"]
    assert sorted(path.name for path in alone.iterdir()) == sorted(
        path.name for path in (tiny_run / "pipeline").iterdir()
    )
    assert_one_line(script("experiments/evaluate.py", alone, "--out", tmp_path / "x", "--solver", "plms"), "unknown")
    assert not (tmp_path / "x").exists()


# train.py


def test_train_continues_a_run_samples_it_and_reports(script, copy, tiny_clips, few_samples):
    before = (copy / "pipeline" / "denoiser.safetensors").read_bytes()
    ended = script("experiments/train.py", ROOT / TINY, "--data", tiny_clips, "--workdir", copy)
    assert ended.code == 0, ended.err
    assert (copy / "pipeline" / "denoiser.safetensors").read_bytes() == before
    assert {"metrics.json", "report.html", "samples"} <= {path.name for path in copy.iterdir()}
    assert "PSNR: " in ended.out


def test_train_accepts_scalar_settings_on_the_command_line(script, copy, tiny_clips):
    ended = script("experiments/train.py", ROOT / TINY, "--data", tiny_clips, "--workdir", copy, "--denoiser.batch", 4)
    assert_one_line(ended, "another config (denoiser.batch is 2 there and 4 here)")


def test_train_refuses_clips_that_do_not_exist(script, tiny_clips, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "metadata.csv").write_text("file_name,text\nmissing.mp4,a cat\n")
    ended = script("experiments/train.py", ROOT / TINY, "--data", clips, "--workdir", tmp_path / "run")
    assert_one_line(ended, "(first: missing.mp4: line 2 names it, but it is not there)")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_train_accepts_addresses_of_data_sets(script, copy, tiny_clips, memory, few_samples):
    ingest(tiny_clips, f"{memory}/data")
    shutil.rmtree(copy / "data")
    copy_of = copy / "latents"
    for path in copy_of.rglob("*.*"):
        if path.is_file():
            upload(path, to_storage_path(f"{memory}/latents") / path.relative_to(copy_of).as_posix())
    shutil.rmtree(copy_of)
    before = (copy / "pipeline" / "denoiser.safetensors").read_bytes()
    arguments = ("experiments/train.py", ROOT / TINY, "--workdir", copy, "--data", f"{memory}/data")
    ended = script(*arguments, "--latents", f"{memory}/latents")
    assert ended.code == 0, ended.err
    assert (copy / "pipeline" / "denoiser.safetensors").read_bytes() == before
    assert "PSNR: " in ended.out
    assert_one_line(
        script(*arguments, "--latents", f"{memory}/l"), f"with the latents {memory}/latents, not {memory}/l"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("memory://bucket/none", "no such data set: memory://bucket/none"),
        ("nonsense://bucket/data", "nonsense://, which fsspec doesn't know"),
        ("gs:/bucket/data", "an address that went through pathlib"),
    ],
)
def test_train_refuses_addresses_without_data(script, memory, tmp_path, data, message):
    ended = script("experiments/train.py", ROOT / TINY, "--data", data, "--workdir", tmp_path / "run")
    assert_one_line(ended, message)
    assert not (tmp_path / "run").exists()


def test_train_refuses_folders_without_clips(script, tmp_path):
    def start(data):
        return script("experiments/train.py", ROOT / TINY, "--data", data, "--workdir", tmp_path / "run")

    assert_one_line(start(tmp_path / "nowhere"), "no such folder")
    (tmp_path / "empty").mkdir()
    assert_one_line(start(tmp_path / "empty"), "holds no clips")
    (tmp_path / "file").write_text("")
    assert_one_line(start(tmp_path / "file"), "is a file")
    assert not (tmp_path / "run").exists()


def test_train_refuses_files_that_are_no_configs(script, tmp_path):
    def start(*arguments):
        return script("experiments/train.py", *arguments, "--data", tmp_path, "--workdir", tmp_path / "run")

    assert_one_line(start(), "must be a config; use train.py")
    assert_one_line(start(tmp_path / "nowhere.py"), "nowhere.py does not exist; use")
    (tmp_path / "other.py").write_text("EXPERIMENT = 3")
    assert_one_line(start(tmp_path / "other.py"), "defines no EXPERIMENT")
    (tmp_path / "config.yaml").write_text("a: 1")
    assert_one_line(start(tmp_path / "config.yaml"), "is not a Python file")
    disagreeing = (ROOT / TINY).read_text().replace("context_width=16", "context_width=8")
    (tmp_path / "disagreeing.py").write_text(disagreeing)
    assert_one_line(start(tmp_path / "disagreeing.py"), "Use backbone.context_width=16")
    assert_one_line(start(ROOT / TINY, "--data.max-frames", 8), "T=8 is not 1 + 4k")


def test_train_explains_itself(script):
    ended = script("experiments/train.py", "--help")
    assert ended.code == 0
    assert "--data CLIPS" in ended.out


# finetune.py and distill.py


@pytest.mark.parametrize("command", ["finetune", pytest.param("distill", marks=pytest.mark.slow)])
def test_models_are_trained_further_from_addresses_and_names_on_the_hub(command, script, copy, memory, monkeypatch):
    """They are what `dit_video.load` takes; here each is opened until its length of clips is refused."""

    def download(name, *, allow_patterns):
        if name != "someone/tiny":
            raise ConnectionError("no route to host")
        return str(copy)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    RemoteFolder(f"{memory}/runs/mine", copy).send()
    length = "T=6 is not 1 + 4k"
    for model, message in (
        (f"{memory}/runs/mine", length),
        (f"{memory}/runs/mine/pipeline", length),
        ("someone/tiny", length),
        ("someone/other", "hf download someone/other"),
        (f"{memory}/runs/none", f"no such run: {memory}/runs/none"),
    ):
        ended = script(f"experiments/{command}.py", model, "--data", "clips", "--max-frames", 6)
        assert_one_line(ended, message)


# quickstart.py


@pytest.fixture
def tiny_quickstart(tiny, tiny_run, monkeypatch, few_samples):
    """Replace the experiment of the quickstart by the tiny one, and its training by a copy of the tiny run."""
    quickstart = types.SimpleNamespace(make_experiment=tiny.experiment, count_clips=lambda *, brief: tiny.COUNT)
    monkeypatch.setitem(sys.modules, "configs", types.SimpleNamespace(quickstart=quickstart, unet=quickstart))
    render = shapes.write_folder
    monkeypatch.setattr(shapes, "write_folder", lambda *args, **kwargs: render(*args, **kwargs, sizes=tiny.SIZES))
    train, trained = Run.train, []

    def copied(run, clips):
        if not (run.folder / "data").exists():
            trained.append(run.folder)
            shutil.copytree(tiny_run, run.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("experiment.json"))
        return train(run, clips)

    monkeypatch.setattr(Run, "train", copied)
    return trained


def test_the_quickstart_makes_a_report_and_can_be_repeated(script, tiny_quickstart, tmp_path):
    work = tmp_path / "work"
    first = script("experiments/quickstart.py", "--workdir", work)
    assert first.code == 0, first.err
    assert tiny_quickstart == [work]
    assert {"clips", "data", "pipeline", "samples", "metrics.json", "report.html", "timing.json"} <= {
        path.name for path in work.iterdir()
    }
    assert "colour as prompted: " in first.out
    assert f"minutes; report: {work / 'report.html'}" in first.out
    assert "whole run" in (work / "report.html").read_text(encoding="utf-8")
    assert "rendering clips 24/24" in first.err
    assert "sampling 3/3" in first.err
    minutes = (work / "timing.json").read_bytes()
    samples = (work / "samples" / "prompts.json").read_bytes()

    again = script("experiments/quickstart.py", "--workdir", work)
    assert again.code == 0, again.err
    assert "training the" not in again.err
    assert (work / "timing.json").read_bytes() == minutes
    assert (work / "samples" / "prompts.json").read_bytes() == samples
    assert_one_line(script("experiments/quickstart.py", "--workdir", work, "--seed", 1), "another config")
    assert_one_line(
        script("experiments/quickstart.py", "--workdir", tmp_path / "x", "--seed", "-1"), "--seed -1 is invalid"
    )


def test_the_report_of_a_resumed_run_states_no_duration(script, tiny_quickstart, tiny, tmp_path):
    Run.create(tmp_path / "work", tiny.EXPERIMENT)  # a start that was interrupted at once
    ended = script("experiments/quickstart.py", "--workdir", tmp_path / "work")
    assert ended.code == 0, ended.err
    assert "minutes;" not in ended.out
    assert "whole run" not in (tmp_path / "work" / "report.html").read_text(encoding="utf-8")
