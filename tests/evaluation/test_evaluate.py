import json
from dataclasses import replace

import numpy as np
import pytest

from dit_video.apps.reports.run_report import write_autoencoder_report
from dit_video.core.errors import UserError
from dit_video.data.sizes import read_fitted_clip
from dit_video.diffusion import Guidance
from dit_video.evaluation import evaluate, requests
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.metrics.likelihood import LossByTime
from dit_video.evaluation.metrics.metric import MetricBatch, MetricValue
from dit_video.evaluation.metrics.reconstruction import LinearPsnr, psnr, ssim
from dit_video.experiment.run import Run
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline, Request
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
def held_out(tiny_run):
    return Run.open(tiny_run).held_out_clips


@pytest.fixture(scope="module")
def limits(tiny):
    return tiny.EXPERIMENT.limits


def test_captions_are_spread_over_the_clips_at_their_sizes(held_out, limits):
    made = requests.make_caption_requests(held_out, limits, count=2, seed=3, first_index=4)
    ends = held_out.infos[0], held_out.infos[-1]
    assert [each.request.prompt for each in made] == [info.caption for info in ends]
    assert [each.request.size for each in made] == [Grid(info.frames, info.height, info.width) for info in ends]
    assert [each.request.seed for each in made] == [3004, 3005]
    assert [each.request.image for each in made] == [None, None]
    animated = requests.make_caption_requests(held_out, limits, count=2, seed=3, use_first_frame=True)
    for each, index in zip(animated, (0, len(held_out) - 1), strict=True):
        clip = read_fitted_clip(held_out, index, limits)
        np.testing.assert_array_equal(each.request.image.frames, clip.frames[:1])
        np.testing.assert_array_equal(each.read_reference().frames, clip.frames)
    assert len(requests.make_caption_requests(held_out, limits, count=99, seed=3)) == len(
        {info.caption for info in held_out.infos}
    )


def test_reconstructions_are_of_the_held_out_clips_at_their_training_sizes(tiny_pipeline, held_out, limits):
    results = evaluate.reconstruct(tiny_pipeline.codec, held_out, limits)
    assert [one.name for one in results] == [info.name for info in held_out.infos]
    for one, info in zip(results, held_out.infos, strict=True):
        assert one.original.frames.shape == one.decoded.frames.shape == (info.frames, info.height, info.width, 3)
        assert 5 < psnr(one.original.frames, one.decoded.frames) < 60
        assert 0 <= ssim(one.original.frames, one.decoded.frames) < 1
        assert one.baseline is None


def test_the_best_linear_autoencoder_is_reported_for_comparison(tiny_pipeline, tiny_run, held_out, limits):
    linear = Run.open(tiny_run).linear_baseline()
    assert linear.basis.shape[1] == tiny_pipeline.config.model.autoencoder.channels
    results = evaluate.reconstruct(tiny_pipeline.codec, held_out, limits, linear=linear)
    baselines = [one.baseline for one in results]
    values = LinearPsnr().measure(MetricBatch(pairs=results, baselines=baselines))
    for one, value in zip(results, values, strict=True):
        assert one.baseline.frames.shape == one.original.frames.shape
        assert 10 < value == psnr(one.original.frames, one.baseline.frames) < 60


@pytest.mark.nightly
def test_a_measure_of_the_denoiser_reads_the_held_out_clips(tiny_pipeline, tiny_run, held_out, tmp_path):
    clips = Run.open(tiny_run).evaluation_clips()
    config = CaptionEvaluation(trained=1, held_out=0, metrics=(LossByTime(bins=2),))
    result = evaluate.evaluate(
        tiny_pipeline, tmp_path, seed=0, clips=clips, evaluation=config, sampling=tiny_pipeline.make_sampling(steps=1)
    )
    assert result.results["denoising_loss"].estimate.count == len(held_out.infos)
    values = json.loads((tmp_path / "metrics.json").read_text())["clips"]
    assert [len(each) for each in values.values()] == [1] * len(held_out.infos)
    mean = np.mean([each["denoising_loss"] for each in values.values()])
    assert mean == pytest.approx(result.results["denoising_loss"].estimate.value)


def test_an_autoencoder_alone_is_measured_and_reported(tiny_run, held_out, tmp_path):
    run = Run.open(tiny_run)
    metrics = run.experiment.evaluation.metrics
    measured = evaluate.evaluate_autoencoder(run.codec(), run.evaluation_clips(), tmp_path, metrics=metrics)
    assert list(measured.results) == ["psnr", "ssim", "linear_psnr"]
    assert measured.metrics["clips"].keys() == {info.name for info in held_out.infos}
    for name, result in measured.results.items():
        values = [clip[name] for clip in measured.metrics["clips"].values()]
        assert result.estimate.value == np.mean(values)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(measured.metrics, allow_nan=False))
    write_autoencoder_report(tmp_path / "report.html", run, measured)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the best linear autoencoder" in page
    assert page.count("SSIM <b>") == len(held_out)


def test_an_evaluation_of_shapes_measures_prompt_following(tiny_pipeline, tiny_run, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: REQUESTS)
    measured = evaluate.evaluate(
        tiny_pipeline,
        tmp_path,
        seed=7,
        clips=Run.open(tiny_run).evaluation_clips(),
        sampling=tiny_pipeline.make_sampling(guidance=1.0, times=(1, 0.5)),
    )
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == json.loads(json.dumps(measured.metrics, allow_nan=False))
    assert measured.metrics["parameters"] == tiny_pipeline.count_parameters()
    assert measured.metrics["clips"].keys() == {info.name for info in held_out.infos}
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
    seconds = measured.metrics["sampling"].pop("seconds")
    assert seconds >= 0
    expected = {"samples": 3, "seed": 7, "steps": 2, "guidance": 1.0, "times": [1.0, 0.5, 0.0], "solver": "euler"}
    assert measured.metrics["sampling"] == expected
    assert len(measured.samples) == 3
    batch = MetricBatch(samples=[clip for _, clip in measured.samples], prompts=[one.prompt for one in REQUESTS])
    judged = PromptFollowing().list_examples(tuple(PromptFollowing().measure(batch)))
    assert list(measured.metrics["samples"].values()) == judged
    assert len(measured.reconstructions) == len(held_out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "samples"]


def test_samples_do_not_depend_on_the_metrics(tiny_pipeline, tiny_run, tmp_path, monkeypatch):
    """Without a metric of reconstructions nothing is reconstructed."""
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: REQUESTS)
    config = replace(tiny_pipeline.config, evaluation=ShapesEvaluation(metrics=(PromptFollowing(),)))
    few = Pipeline(config, autoencoder=tiny_pipeline.codec.params, denoiser=tiny_pipeline.denoiser_params)
    clips = Run.open(tiny_run).evaluation_clips()
    measured = evaluate.evaluate(tiny_pipeline, tmp_path / "all", seed=7, clips=clips)
    one = evaluate.evaluate(few, tmp_path / "one", seed=7, clips=clips)
    for first, second in zip(one.samples, measured.samples, strict=True):
        assert first.entry == second.entry
        np.testing.assert_array_equal(first.clip.frames, second.clip.frames)
    assert one.results.items() <= measured.results.items()
    assert (one.reconstructions, one.metrics["clips"]) == ([], {})


def test_an_evaluation_by_captions_uses_held_out_captions(tiny_pipeline, tiny_run, tmp_path):
    config = replace(tiny_pipeline.config, evaluation=CaptionEvaluation(trained=3, held_out=2))
    pipeline = Pipeline(config, autoencoder=tiny_pipeline.codec.params, denoiser=tiny_pipeline.denoiser_params)
    run = Run.open(tiny_run)
    measured = evaluate.evaluate(pipeline, tmp_path, seed=0, clips=run.evaluation_clips())
    prompts = [sample.entry["prompt"] for sample in measured.samples]
    assert measured.is_trained_caption == [True, True, True, False, False]
    assert set(prompts[:3]) <= {info.caption for info in run.training_clips.infos}
    assert set(prompts[3:]) <= {info.caption for info in run.held_out_clips.infos}
    assert len({sample.entry["seed"] for sample in measured.samples}) == 5
    assert list(measured.results) == ["psnr", "ssim", "linear_psnr"]
    with pytest.raises(UserError, match="there are no captions to sample"):
        evaluate.evaluate(pipeline, tmp_path / "other", seed=0)


def test_without_a_caption_to_sample_clips_are_only_reconstructed(tiny_pipeline, tiny_run, tmp_path):
    clips, config = Run.open(tiny_run).evaluation_clips(), CaptionEvaluation(trained=0, held_out=0)
    for _ in range(2):
        measured = evaluate.evaluate(tiny_pipeline, tmp_path, seed=0, clips=clips, evaluation=config)
        assert (measured.samples, len(measured.reconstructions)) == ([], len(clips.held_out))
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.nightly
def test_a_pipeline_alone_is_sampled_without_reconstructions(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_evaluation, "make_shape_requests", lambda seed: REQUESTS[1:2])
    measured = evaluate.evaluate(tiny_pipeline, tmp_path, seed=0)
    assert measured.reconstructions == []
    assert measured.results["psnr"].estimate == MetricValue(value=None, count=0)
    assert measured.results["colour"].estimate.count == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed=-1 is invalid"),
        ({"seed": 0, "sampling": Sampling(guidance=Guidance(scales={"text": (2.0, 1.0)}))}, "has no second expert"),
    ],
)
def test_wrong_arguments_end_an_evaluation_before_it_begins(tiny_pipeline, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(tiny_pipeline, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
