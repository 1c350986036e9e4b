"""Monitors of a run: accumulated batches, several averages, the loss of held-out clips, samples and a trace."""

import dataclasses
import json
import shutil
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.registry import register
from dit_video.core.trees import flatten
from dit_video.evaluation.clip_set import NO_CLIPS, open_clip_set
from dit_video.evaluation.comparison import compare
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.metrics.frames import Sharpness
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.metrics.reconstruction import Psnr
from dit_video.evaluation.protocol import EvaluationData, EvaluationItem, EvaluationProtocol
from dit_video.experiment import LoraAdapters, monitors
from dit_video.experiment.monitors import EvaluationHook
from dit_video.experiment.run import Run
from dit_video.models.backbones.flops import count_training_flops
from dit_video.sampling.request import Request
from dit_video.tokens import Grid, PackedExample, PackedShape, compute_positions, infer_grid, pack
from dit_video.training.hooks import logging
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.training.optim.ema import EmaConfig
from dit_video.video import Clip, decode
from support import tiny_pipeline
from support.devices import check_on_eight_devices


def test_clips_are_tiled_into_one_sheet():
    clips = [Clip(np.full((2, 4, 6, 3), 10 * index, np.uint8), 8.0) for index in range(3)]
    sheet = monitors.tile_clips(clips, gap=2)
    assert sheet.frames.shape == (2, 10, 14, 3)
    for index, (top, left) in enumerate(((0, 0), (0, 8), (6, 0))):
        np.testing.assert_array_equal(sheet.frames[:, top : top + 4, left : left + 6], 10 * index)
    assert (sheet.frames[:, 4:6] == 255).all()


def test_the_flops_of_rows_are_those_of_their_clips(tiny):
    training, backbone = tiny.EXPERIMENT.denoiser, tiny.EXPERIMENT.model.backbone
    shape = PackedShape(tokens=20, text=9, segments=3)
    grids, texts = (Grid(2, 2, 2), Grid(1, 2, 3), Grid(1, 1, 4)), (4, 2, 3)
    items = [
        PackedExample(np.zeros((grid.volume, 4), np.float32), compute_positions(grid), np.zeros(text, np.int32), 0)
        for grid, text in zip(grids, texts, strict=True)
    ]
    rows = [pack(part, shape, width=4) for part in (items[:2], items[2:])]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    work = monitors.make_flops_fn(training, backbone)
    assert work is not None
    assert work(batch) == count_training_flops(backbone, [grid.volume for grid in grids], texts)
    adapters = dataclasses.replace(training, train=LoraAdapters(init_from="somewhere"))
    adapted = monitors.make_flops_fn(adapters, backbone)
    assert adapted is not None
    assert adapted(batch) == work(batch) * 2 // 3
    assert [infer_grid(compute_positions(grid)) for grid in grids] == list(grids)


WATCHED = MonitoringConfig(
    validate_every=3,
    validation_batches=2,
    sample_every=6,
    evaluate_every=3,
    prompts=("a red circle", "a square", "x"),
)
AVERAGES = EmaConfig(decays=(0.2,), sigmas=(0.05, 0.1), snapshot_every=1)


@pytest.fixture(scope="module")
def watched(tiny, tiny_run, tiny_clips, tmp_path_factory):
    """Return a finished run with the autoencoder and latents of the tiny run and all monitors of a denoiser."""
    folder = shutil.copytree(tiny_run, tmp_path_factory.mktemp("watched") / "run")
    for part in ("denoiser", "pipeline"):
        shutil.rmtree(folder / part)
    experiment = tiny.EXPERIMENT.replace_stage("denoiser", steps=6, accumulation_steps=2, averages=AVERAGES)
    evaluation = CaptionEvaluation(metrics=(Sharpness(),), trained=2, held_out=0)
    experiment = dataclasses.replace(experiment, monitoring=WATCHED, evaluation=evaluation)
    opened = dataclasses.replace(Run.open(folder), experiment=experiment, profile=(3, 3))
    opened._write_config()
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        real = monitors.make_validation
        patch.setattr(monitors, "make_validation", lambda *args: kept.append(real(*args)) or kept[-1])
        opened.train(tiny_clips)
    return SimpleNamespace(run=opened, validation=kept[0], folder=folder)


@pytest.mark.slow
def test_held_out_clips_are_judged_the_same_each_time(watched):
    entries = {entry["step"]: entry for entry in logging.read_metrics(watched.folder / "denoiser" / "metrics.jsonl")}
    assert sorted(entries) == [3, 6]
    result = [entries[step]["validation_loss"] for step in (3, 6)]
    assert np.isfinite(result).all()
    assert result[0] != result[1]
    assert any(name.startswith("validation_loss_t") for name in entries[6])
    assert any(name.startswith("loss_t") for name in entries[6])
    assert entries[6]["tokens_per_second"] > 0
    assert entries[6]["model_flops_per_second"] > 0
    assert entries[6]["skipped"] == 0
    times = {f"{name}_seconds" for name in ("validate", "sample", "evaluate", "snapshot", "interval")}
    assert times <= entries[6].keys()
    # The final weights give the final figure again, because noise and times are the same.
    state = SimpleNamespace(ema=watched.run.newest_pipeline().denoiser_params)
    assert watched.validation.call(1000, state)["validation_loss"] == pytest.approx(result[1], rel=1e-6)


@pytest.mark.slow
def test_a_run_leaves_samples_and_a_trace_in_its_folder(watched):
    path, tiles_path = sorted((watched.folder / "denoiser" / "samples").iterdir())
    assert path.name == "00000006.mp4"
    size = watched.run.pipeline_config().size
    clip = decode(path)
    assert clip.frames.shape == (size.t, 2 * size.h + 2, 2 * size.w + 2, 3)
    tiles = json.loads(tiles_path.read_text())
    assert (tiles["height"], tiles["width"]) == clip.frames.shape[1:3]
    assert (tiles["tile_height"], tiles["tile_width"]) == (size.h, size.w)
    assert [(tile["text"], tile["top"], tile["left"]) for tile in tiles["tiles"]] == [
        ("a red circle", 0, 0),
        ("a square", 0, size.w + 2),
        ("x", size.h + 2, 0),
    ]
    assert list((watched.folder / "denoiser" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_a_run_is_evaluated_while_it_trains(watched):
    folders = [watched.folder / "denoiser" / "evaluations" / f"step_{step}" for step in (3, 6)]
    comparison = compare(folders)
    assert comparison.steps == (3, 6)
    first, second = comparison.values["sharpness"]
    assert first.count == second.count == 2
    assert first.value != second.value


@pytest.mark.slow
def test_each_average_can_be_sampled_from(watched):
    folder = watched.folder
    usual, own, short, none = (flatten(dit_video.load(folder, ema=ema).denoiser_params) for ema in (None, 0.9, 0.2, 0))
    wide, narrow = (flatten(dit_video.load(folder, sigma_rel=s).denoiser_params) for s in (0.1, 0.05))
    path = max(usual, key=lambda name: np.abs(usual[name] - none[name]).max())  # the parameter that moved most
    np.testing.assert_array_equal(usual[path], own[path])
    for one, other in ((usual, short), (short, none), (wide, narrow), (wide, usual)):
        assert one.keys() == other.keys()
        assert np.abs(one[path] - other[path]).max() > 0, path
    # The shorter an average, the nearer to where training ended.
    far = [np.abs(one[path] - none[path]).mean() for one in (short, usual)]
    assert far[0] < far[1]
    with pytest.raises(UserError, match=r"no average of decay 0.99; use 0.9, 0.2, or 0"):
        dit_video.load(folder, ema=0.99)
    with pytest.raises(UserError, match="give ema or sigma_rel"):
        dit_video.load(folder, ema=0.9, sigma_rel=0.1)
    with pytest.raises(UserError, match=r"is not a run and .*; leave out ema"):
        dit_video.load(folder / "pipeline", ema=0.9)


def test_fields_that_a_written_config_lacks_have_their_defaults(tiny):
    document = config_json.to_json(tiny.EXPERIMENT)
    for part, names in (
        (document, ("monitoring", "max_consecutive_skips")),
        (document["stages"][1], ("averages", "accumulation_steps")),
    ):
        for name in names:
            del part[name]
    assert config_json.from_json(document) == tiny.EXPERIMENT


@pytest.mark.nightly  # another test compares the samples of two processes
def test_samples_during_training_on_eight_devices_are_those_of_one(tiny_clips):
    check_on_eight_devices("samples_during_training.py", str(tiny_clips))


@register
@dataclass(frozen=True, kw_only=True)
class TwoPrompts(EvaluationProtocol):
    """Two samples."""

    name: str = "two"

    def make_items(self, pipeline, data):
        return [
            EvaluationItem(Request(prompt, Grid(5, 16, 16), seed=number))
            for number, prompt in enumerate(("a red circle", "a blue square"))
        ]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline.make_pipeline(tiny_pipeline.make_config(steps=1))


def make_hook(folder, pipeline, *metrics):
    return EvaluationHook(
        folder,
        every=10,
        protocol=TwoPrompts(metrics=metrics or (Sharpness(), Psnr())),
        data=EvaluationData(NO_CLIPS),
        make_pipeline=lambda params: pipeline,
    )


def test_it_is_due_at_the_interval_only(tmp_path, pipeline):
    hook = make_hook(tmp_path, pipeline)
    assert [step for step in range(1, 26) if hook.is_due(step, is_last=step == 25)] == [10, 20]


def test_training_goes_on_while_samples_are_measured(tmp_path, pipeline, monkeypatch):
    measured, decode = threading.Event(), pipeline.decode_many

    def decode_late(*args):
        assert measured.wait(30)
        return decode(*args)

    monkeypatch.setattr(pipeline, "decode_many", decode_late)
    hook = make_hook(tmp_path, pipeline)
    assert hook.call(10, SimpleNamespace(ema={})) == {}
    assert hook.derive({}) == {}
    assert not (tmp_path / "step_10" / "metrics.json").exists()
    measured.set()
    hook.close()
    values = hook.derive({})
    record = json.loads((tmp_path / "step_10" / "metrics.json").read_text())
    (result,) = record["results"]
    assert result["count"] == 2
    assert values == {"evaluation_sharpness": result["value"], "evaluation_step": 10}
    assert record["protocol"]["sampling"]["steps"] == 1
    samples = open_clip_set(tmp_path / "step_10" / "samples")
    batch = MetricBatch(samples=[samples.read(number, None) for number in range(2)])
    assert np.mean(Sharpness().measure(batch)) == pytest.approx(result["value"], rel=1e-5)


def test_the_last_entry_waits_for_the_values(tmp_path, pipeline, monkeypatch):
    decode = pipeline.decode_many

    def decode_slowly(*args):
        time.sleep(0.5)
        return decode(*args)

    monkeypatch.setattr(pipeline, "decode_many", decode_slowly)
    hook = make_hook(tmp_path, pipeline)
    hook.call(10, SimpleNamespace(ema={}))
    assert not hook.is_due(11, is_last=False)
    assert hook.derive({}) == {}
    assert not hook.is_due(12, is_last=True)
    assert hook.derive({}).keys() == {"evaluation_sharpness", "evaluation_step"}
    hook.close()


def test_samples_are_kept_where_no_metric_can_be_computed(tmp_path, pipeline):
    hook = make_hook(tmp_path, pipeline, Psnr())
    hook.call(10, SimpleNamespace(ema={}))
    hook.close()
    assert hook.derive({}) == {"evaluation_step": 10}
    assert len(open_clip_set(tmp_path / "step_10" / "samples").names) == 2


def test_an_error_of_a_measurement_ends_the_training(tmp_path, pipeline, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(pipeline, "decode_many", fail)
    hook = make_hook(tmp_path, pipeline)
    hook.call(10, SimpleNamespace(ema={}))
    with pytest.raises(OSError, match="disk full"):
        hook.close()
