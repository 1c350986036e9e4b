"""Evaluations of a run: captions of its clips, prompts of shapes, reconstructions of held-out clips."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_video.apps.reports.run_report import write_autoencoder_report
from dit_video.core.errors import UserError
from dit_video.data.sizes import read_fitted_clip
from dit_video.diffusion import Guidance
from dit_video.evaluation import evaluate
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.metrics.likelihood import LossByTime
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.metrics.reconstruction import psnr, ssim
from dit_video.experiment.run import Run
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Request
from dit_video.scenes import shapes_evaluation
from dit_video.scenes.shape_metrics import PromptFollowing
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from dit_video.tokens import Grid

REQUESTS = [
    Request("a red circle moving left", Grid(9, 16, 32), seed=1),
    Request("a blue square", Grid(1, 16, 16), seed=2),
    Request("a white triangle moving up", Grid(5, 16, 16), seed=3, negative="a red circle"),
]


@pytest.fixture(scope="module")
def run(tiny_run):
    return Run.open(tiny_run)


@pytest.fixture(scope="module")
def data(run):
    return run.evaluation_data()


def test_captions_are_spread_over_the_clips_at_their_sizes(tiny_pipeline, run, data):
    infos = run.held_out_clips.infos
    items = CaptionEvaluation(trained=3, held_out=2, seed=3).make_items(tiny_pipeline, data)
    assert [item.is_trained_caption for item in items] == [True, True, True, False, False]
    made = [item.entry for item in items[3:]]
    ends = infos[0], infos[-1]
    assert [each.prompt for each in made] == [info.caption for info in ends]
    assert [each.size for each in made] == [Grid(info.frames, info.height, info.width) for info in ends]
    assert [each.seed for each in made] == [3003, 3004]
    assert [each.image for each in made] == [None, None]
    for item, index in zip(items[3:], (0, len(infos) - 1), strict=True):
        clip = read_fitted_clip(run.held_out_clips, index, run.limits)
        np.testing.assert_array_equal(item.read_reference().frames, clip.frames)
    every = CaptionEvaluation(trained=0, held_out=99).make_items(tiny_pipeline, data)
    assert len(every) == len({info.caption for info in infos})


def test_a_model_that_always_has_a_first_frame_gets_that_of_the_clip(tiny_pipeline, data, monkeypatch):
    monkeypatch.setattr("dit_video.evaluation.protocol.needs_first_frame", lambda pipeline: True)
    for item in CaptionEvaluation(trained=0, held_out=2).make_items(tiny_pipeline, data):
        np.testing.assert_array_equal(item.entry.image.frames, item.read_reference().frames[:1])


def test_clips_of_a_run_are_measured_at_their_training_rate_alone(data):
    with pytest.raises(UserError, match="fps=4 is invalid: clips of a run are measured at their training rate"):
        data.clips.read(0, 4.0)


def test_an_autoencoder_alone_is_measured_and_reported(run, data, tmp_path):
    measured = evaluate.evaluate_autoencoder(run.codec(), run.experiment.evaluation, tmp_path, data=data)
    assert list(measured.results) == ["psnr", "ssim", "linear_psnr"]
    names = [info.name for info in run.held_out_clips.infos]
    assert list(measured.record["clips"]) == names
    for name, result in measured.results.items():
        values = [clip[name] for clip in measured.record["clips"].values()]
        assert result.estimate.value == np.mean(values)
    linear = run.linear_baseline()
    assert linear.basis.shape[1] == run.model.autoencoder.channels
    for number, info in enumerate(run.held_out_clips.infos):
        original, decoded = data.clips.read(number, None), measured.reconstructions.read(number, None)
        assert original.frames.shape == decoded.frames.shape == (info.frames, info.height, info.width, 3)
        values = measured.record["clips"][info.name]
        assert 5 < psnr(original.frames, decoded.frames) == values["psnr"] < 60
        assert 0 <= ssim(original.frames, decoded.frames) == values["ssim"] < 1
        assert 10 < psnr(original.frames, measured.make_baseline(original).frames) == values["linear_psnr"] < 60
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(measured.record, allow_nan=False))
    write_autoencoder_report(tmp_path / "report.html", run, measured)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the best linear autoencoder" in page
    assert page.count("SSIM <b>") == len(names)


def test_an_evaluation_of_shapes_measures_prompt_following(tiny_pipeline, run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: REQUESTS)
    sampling = tiny_pipeline.make_sampling(guidance=1.0, times=(1, 0.5))
    measured = evaluate.evaluate(tiny_pipeline, ShapesEvaluation(seed=7), tmp_path, data=data, sampling=sampling)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(measured.record, allow_nan=False))
    assert written["model"] == {
        "weights": tiny_pipeline.compute_digest(),
        "parameters": tiny_pipeline.count_parameters(),
    }
    assert written["clips"].keys() == {info.name for info in run.held_out_clips.infos}
    assert [entry["name"] for entry in written["results"]] == list(measured.results)
    (entry,) = (entry for entry in written["results"] if entry["name"] == "colour")
    estimate = measured.results["colour"].estimate
    assert (entry["value"], entry["interval"], entry["count"]) == (
        estimate.value,
        list(estimate.interval),
        len(REQUESTS),
    )
    assert (entry["unit"], entry["is_higher_better"]) == ("%", True)
    assert entry["metric"] == "dit_video.scenes.shape_metrics:PromptFollowing"
    assert measured.seconds > 0
    assert measured.sampling == sampling
    assert written["protocol"]["sampling"]["steps"] == 2
    assert written["protocol"]["config"]["seed"] == 7
    samples = [measured.samples.read(number, None) for number in range(3)]
    batch = MetricBatch(samples=samples, prompts=[one.prompt for one in REQUESTS])
    judged = PromptFollowing().list_examples(tuple(PromptFollowing().measure(batch)))
    assert list(written["examples"].values()) == judged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "samples"]


def test_samples_do_not_depend_on_the_metrics(tiny_pipeline, data, tmp_path, monkeypatch):
    """Without a metric of reconstructions nothing is reconstructed; samples are made once for all metrics."""
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: REQUESTS)
    protocol = ShapesEvaluation(metrics=(PromptFollowing(),))
    measured = evaluate.evaluate(tiny_pipeline, ShapesEvaluation(), tmp_path, data=data)
    times = [path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("00*")]
    one = evaluate.evaluate(tiny_pipeline, protocol, tmp_path, data=data)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("00*")] == times
    assert one.results.items() <= measured.results.items()
    assert (one.reconstructions, one.record["clips"]) == (None, {})


def test_an_evaluation_by_captions_uses_held_out_captions(tiny_pipeline, run, tmp_path):
    experiment = replace(run.experiment, evaluation=CaptionEvaluation(trained=3, held_out=2), seed=5)
    measured = replace(run, experiment=experiment).evaluate(pipeline=tiny_pipeline, folder=tmp_path)
    prompts = measured.samples.captions
    assert [item.is_trained_caption for item in measured.items] == [True, True, True, False, False]
    assert set(prompts[:3]) <= {info.caption for info in run.training_clips.infos}
    assert set(prompts[3:]) <= {info.caption for info in run.held_out_clips.infos}
    assert [item.entry.seed for item in measured.items] == [5000, 5001, 5002, 5003, 5004]
    assert open_clip_set(tmp_path / "samples").captions == prompts
    assert list(measured.results) == ["psnr", "ssim", "linear_psnr"]
    with pytest.raises(UserError, match="there are no captions to sample"):
        evaluate.evaluate(tiny_pipeline, CaptionEvaluation(), tmp_path / "other")


def test_without_a_caption_to_sample_clips_are_only_reconstructed(tiny_pipeline, data, tmp_path):
    for _ in range(2):
        measured = evaluate.evaluate(tiny_pipeline, CaptionEvaluation(trained=0, held_out=0), tmp_path, data=data)
        assert (measured.samples.names, len(measured.record["clips"])) == ((), len(data.clips.names))
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.nightly
def test_a_measure_of_the_denoiser_reads_the_held_out_clips(tiny_pipeline, data, tmp_path):
    protocol, count = CaptionEvaluation(trained=1, held_out=0, metrics=(LossByTime(bins=2),)), len(data.clips.names)
    sampling = tiny_pipeline.make_sampling(steps=1)
    result = evaluate.evaluate(tiny_pipeline, protocol, tmp_path, data=data, sampling=sampling)
    assert result.results["denoising_loss"].estimate.count == count
    values = json.loads((tmp_path / "metrics.json").read_text())["clips"]
    assert [len(each) for each in values.values()] == [1] * count
    mean = np.mean([each["denoising_loss"] for each in values.values()])
    assert mean == pytest.approx(result.results["denoising_loss"].estimate.value)


@pytest.mark.nightly
def test_a_pipeline_alone_is_sampled_without_reconstructions(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: REQUESTS[1:2])
    measured = evaluate.evaluate(tiny_pipeline, ShapesEvaluation(), tmp_path)
    assert measured.reconstructions is None
    assert "clips to reconstruct" in measured.skipped["psnr"]
    assert measured.results["colour"].estimate.count == 1


def test_wrong_arguments_end_an_evaluation_before_it_begins(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match="seed=-1 is invalid"):
        ShapesEvaluation(seed=-1)
    sampling = Sampling(guidance=Guidance(scales={"text": (2.0, 1.0)}))
    with pytest.raises(UserError, match="has no second expert"):
        evaluate.evaluate(tiny_pipeline, ShapesEvaluation(), tmp_path / "out", sampling=sampling)
    assert not (tmp_path / "out").exists()
