"""The command that fine-tunes a folder of Wan on three clips, with samples and a report."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

import dit_video
from dit_video.core.trees import flatten
from dit_video.experiment.export import ADAPTER_FILE, LORA_FILE
from dit_video.families import load_denoiser
from dit_video.families.family import DENOISER_FOLDERS
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.training.hooks import logging
from dit_video.video import Clip, decode
from support.tiny_vace import write_vace
from support.tiny_wan import TWO, write_animating_wan, write_wan

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[2].parent / "shared" / "clips"
REAL = ("again.mkv", "car-detection.mp4", "crystal.webm")
STEPS = 24
COMMON = [
    *("--max-pixels", 32 * 48, "--max-frames", 5, "--dtype", "float32", "--batch", 2, "--steps", STEPS, "--warmup", 1),
    *("--sampling-steps", 2, "--samples", 3, "--log-every", 1, "--save-every", 100),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "wan"
    write_wan(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return a folder of three real clips with captions, or of rendered ones if the real ones are absent."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    if not SHARED.is_dir():
        return shapes.write_folder(folder, count=3, seed=0, sizes=(Grid(9, 32, 48), Grid(5, 32, 32), Grid(9, 48, 32)))
    folder.mkdir()
    for name in REAL:
        shutil.copy(SHARED / name, folder)
    with open(SHARED / "metadata.csv", newline="") as file, open(folder / "metadata.csv", "w", newline="") as chosen:
        writer = csv.DictWriter(chosen, ["file_name", "text"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in csv.DictReader(file) if row["file_name"] in REAL)
    return folder


@pytest.fixture
def finetuned(process, model, clips, tmp_path):
    """Return a function that runs the command, checks the common results and returns the run folder."""

    def start(*options, model=model):
        run = tmp_path / "run"
        ended = process("experiments/finetune.py", model, "--data", clips, "--workdir", run, *COMMON, *options)
        assert ended.code == 0, ended.err
        losses = [entry["loss"] for entry in logging.read_metrics(run / "denoiser" / "metrics.jsonl")]
        assert len(losses) == STEPS
        assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:3]), losses
        samples = sorted((run / "samples").glob("*.mp4"))
        assert len(samples) == 3
        assert {decode(sample).frames.shape[0] for sample in samples} == {5}
        assert (run / "report.html").is_file()
        pipeline = dit_video.load(run)
        image = np.full((16, 16, 3), 200, np.uint8) if pipeline.config.model.backbone.cond_channels else None
        clip = pipeline.generate("a red ball", size=(5, 16, 16), steps=1, image=image)
        assert clip.frames.shape == (5, 16, 16, 3)
        return run

    return start


def test_fine_tuning_with_lora_writes_adapters_that_reproduce_the_run(finetuned, model):
    run = finetuned("--learning-rate", 3e-2, "--lora.rank", 4)
    assert not (run / DENOISER_FOLDERS["backbone"]).exists()
    start, trained = dit_video.load(model, dtype="float32"), flatten(dit_video.load(run).denoiser_params)
    for name in (LORA_FILE, ADAPTER_FILE):
        loaded = flatten(start.load_lora(run / name).denoiser_params)
        for path, leaf in trained.items():
            np.testing.assert_allclose(loaded[path], leaf, atol=1e-5, err_msg=path)
    for path, before in flatten(start.denoiser_params).items():
        adapted = path.startswith("backbone/blocks/") and path.endswith("kernel")
        assert (np.abs(trained[path] - before).max() > 1e-4) == adapted, path


def test_full_fine_tuning_writes_and_changes_every_weight(finetuned, model):
    run = finetuned("--train", "full", "--learning-rate", 3e-3)
    assert not (run / LORA_FILE).exists()
    assert not (run / ADAPTER_FILE).exists()
    config, written = load_denoiser(run / DENOISER_FOLDERS["backbone"])
    before_config, before = load_denoiser(model / "transformer")
    assert config == before_config
    trained, before = flatten(dit_video.load(run).denoiser_params["backbone"]), flatten(before)
    for path, leaf in flatten(written).items():
        np.testing.assert_array_equal(leaf, trained[path], err_msg=path)
        assert np.abs(leaf - before[path]).max() > 1e-6, path


def test_a_model_of_our_own_is_fine_tuned_by_the_same_command(process, clips, tmp_path):
    run = tmp_path / "run"
    model = Path(__file__).parents[2] / "experiments" / "pretrained" / "shapes"
    options = [*("--steps", 3, "--warmup", 1, "--sampling-steps", 2, "--samples", 1, "--max-frames", 5)]
    options += ["--first-frame-prob", 0.5, "--train", "full", "--batch", 1]
    ended = process("experiments/finetune.py", model, "--data", clips, "--workdir", run, *options)
    assert ended.code == 0, ended.err
    assert (run / "report.html").is_file()
    sampled = tmp_path / "clip.mp4"
    Clip(np.full((1, 32, 48, 3), 90, np.uint8), fps=1).save(tmp_path / "image.png")
    options = ["--image", tmp_path / "image.png", "--steps", 2, "--size", "5x32x48", "--out", sampled]
    ended = process("experiments/sample.py", run, "--prompt", "a red circle", *options)
    assert ended.code == 0, ended.err
    assert decode(sampled).frames.shape == (5, 32, 48, 3)


@pytest.fixture(scope="module")
def animating(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "i2v"
    write_animating_wan(folder)
    return folder


@pytest.mark.parametrize("train", ["lora", pytest.param("full", marks=pytest.mark.nightly)])
def test_fine_tuning_an_image_to_video_model_trains_the_layers_of_image_tokens(finetuned, animating, train):
    """Both ways of training change the layers that read the tokens of the image."""
    rate = {"lora": 3e-2, "full": 3e-3}[train]
    run = finetuned("--train", train, "--learning-rate", rate, "--lora.rank", 4, model=animating)
    start, pipeline = dit_video.load(animating, dtype="float32"), dit_video.load(run)
    assert pipeline.config.model.image_encoder == str(animating / "image_encoder")
    before, trained = flatten(start.denoiser_params), flatten(pipeline.denoiser_params)
    for path, leaf in before.items():
        changed = train == "full" or (path.startswith("backbone/blocks/") and path.endswith("kernel"))
        assert (np.abs(trained[path] - leaf).max() > 1e-6) == changed, path
    if train == "lora":
        loaded = flatten(start.load_lora(run / LORA_FILE).denoiser_params)
    else:
        loaded = flatten({"backbone": load_denoiser(run / DENOISER_FOLDERS["backbone"])[1]})
    assert {"backbone/blocks/image_key/kernel", "backbone/blocks/image_value/kernel"} <= loaded.keys()
    for path, leaf in loaded.items():
        np.testing.assert_allclose(leaf, trained[path], atol=1e-5, err_msg=path)


@pytest.mark.nightly
def test_fine_tuning_a_model_with_control_adapts_its_control_layers_too(finetuned, tmp_path):
    write_vace(tmp_path / "vace")
    targets = ("--lora.targets", r"^backbone/(control/)?blocks/.*kernel$")
    run = finetuned("--learning-rate", 3e-2, "--lora.rank", 4, *targets, model=tmp_path / "vace")
    start, pipeline = dit_video.load(tmp_path / "vace", dtype="float32"), dit_video.load(run)
    assert pipeline.config.conditioner == start.config.conditioner
    trained, before = flatten(pipeline.denoiser_params), flatten(start.denoiser_params)
    for name in (LORA_FILE, ADAPTER_FILE):
        loaded = flatten(start.load_lora(run / name).denoiser_params)
        for path, leaf in trained.items():
            np.testing.assert_allclose(loaded[path], leaf, atol=1e-5, err_msg=path)
    for path, leaf in before.items():
        adapted = path.startswith(("backbone/blocks/", "backbone/control/blocks/")) and path.endswith("kernel")
        assert (np.abs(trained[path] - leaf).max() > 1e-4) == adapted, path
    image, control = np.full((16, 16, 3), 200, np.uint8), dit_video.Clip(np.zeros((5, 16, 16, 3), np.uint8), 16)
    clip = pipeline.generate("a red ball", size=(5, 16, 16), steps=1, image=image, control=control)
    assert clip.frames.shape == (5, 16, 16, 3)


def test_one_of_two_experts_is_trained_and_the_other_stays(finetuned, tmp_path):
    """Samples come from both experts, the trained one and the other."""
    write_wan(tmp_path / "two", **TWO | {"boundary_ratio": 0.5})
    run = finetuned("--expert", "low", "--learning-rate", 3e-2, "--lora.rank", 4, model=tmp_path / "two")
    assert not any((run / name).exists() for name in DENOISER_FOLDERS.values())
    start, pipeline = dit_video.load(tmp_path / "two", dtype="float32"), dit_video.load(run)
    assert pipeline.config.boundary == 0.5
    trained, before = flatten(pipeline.denoiser_params), flatten(start.denoiser_params)
    for name in (LORA_FILE, ADAPTER_FILE):
        loaded = flatten(start.load_lora(run / name, expert="low_noise").denoiser_params)
        for path, leaf in trained.items():
            np.testing.assert_allclose(loaded[path], leaf, atol=1e-5, err_msg=path)
    for path, leaf in before.items():
        adapted = path.startswith("low_noise/blocks/") and path.endswith("kernel")
        assert (np.abs(trained[path] - leaf).max() > 1e-4) == adapted, path
