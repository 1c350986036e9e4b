import html
import json
from dataclasses import replace

import pytest

from dit_video.core import config_json
from dit_video.data.synthetic import shapes
from dit_video.evaluation import evaluate
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.evaluate import ClipReconstruction, EvaluationResult, SavedSample
from dit_video.evaluation.metrics.prompt_following import prompt_following
from dit_video.pipelines.pipeline import Pipeline
from dit_video.reports.run_report import write_run_report
from dit_video.video import Clip


def entry(clip, name, seed):
    frames, height, width = clip.frames.shape[:3]
    return {"file": name, "prompt": clip.caption, "frames": frames, "height": height, "width": width, "seed": seed}


@pytest.fixture(scope="module")
def measured(tiny_pipeline):
    """Return an evaluation whose samples are rendered, as by a perfect model."""
    descriptions = [shapes.TRAINING[0], shapes.HELD_OUT[0], shapes.IMAGES[3]]
    samples = []
    for number, description in enumerate(descriptions):
        frames = 1 if description.direction is None else 9
        geometry = shapes.sample_geometry(
            shapes.rng.make_generator(0, "report", number), description, height=32, width=32
        )
        clip = shapes.render(description, geometry, frames=frames, height=32, width=32)
        samples.append(SavedSample(entry(clip, f"{number}.mp4", 40 + number), clip))
    original = samples[0].clip
    verdicts = evaluate.judge_samples(samples)
    reconstruction = ClipReconstruction("clips/7.mp4", original, original, float("inf"), 1.0)
    metrics = {
        "parameters": tiny_pipeline.count_parameters(),
        "reconstruction": evaluate._compute_reconstruction_metrics([reconstruction]),
        "sampling": {"samples": 3, "seed": 0, "steps": 5, "guidance": 1.5, "sampler": "heun", "seconds": 1.0},
        "prompt_following": prompt_following(verdicts),
    }
    return EvaluationResult(metrics, [reconstruction], samples, [True, False, True], verdicts)


def page(path):
    return path.read_text(encoding="utf-8")


def test_the_report_states_the_guidance_of_both_experts(tiny_pipeline, measured, tmp_path):
    drawn = measured.metrics["sampling"] | {"guidance": (4.0, 3.5)}
    measured = measured._replace(metrics=measured.metrics | {"sampling": drawn})
    write_run_report(tmp_path / "report.html", tiny_pipeline, measured, title="A run", source=tmp_path)
    assert "guidance 4 and 3.5, one sample" in page(tmp_path / "report.html")


def test_the_report_of_a_run_shows_all_of_it(tiny, tiny_run, tiny_pipeline, measured, tmp_path):
    write_run_report(
        tmp_path / "report.html",
        tiny_pipeline,
        measured,
        title="A run",
        source=tiny_run,
        config=config_json.to_json(tiny.EXPERIMENT),
        minutes=3.25,
    )
    text = page(tmp_path / "report.html")
    assert "5 steps of heun, guidance 1.5, one sample per prompt, not selected" in text
    assert "colour as prompted" in text
    assert "100.0%" in text
    assert "3.2 min" in text
    assert "100.0 dB" in text
    assert "∞" in text
    for heading in ("Samples", "Reconstructions", "Training", "Metrics", "Generate more samples", "Config"):
        assert f">{heading}" in text
    assert "Autoencoder" in text
    assert "Denoiser" in text
    assert text.count("not in training</span>") == 1
    assert "seed 41" in text
    assert f"sample.py {tiny_run} --prompt" in html.unescape(text)
    assert "dit_video.experiment:Experiment" in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_pipeline_without_a_run_has_no_curves(tiny_run, tiny_pipeline, measured, tmp_path):
    write_run_report(tmp_path / "report.html", tiny_pipeline, measured, title="Alone", source=tiny_run / "pipeline")
    text = page(tmp_path / "report.html")
    assert ">Training" not in text
    assert "whole run" not in text
    assert "dit_video.pipelines.config:PipelineConfig" in text
    assert str(tiny_run / "pipeline") in text


def test_free_captions_get_no_verdict(tiny_run, tiny_pipeline, measured, tmp_path):
    config = replace(tiny_pipeline.config, evaluation=CaptionEvaluation())
    pipeline = Pipeline(config, autoencoder=tiny_pipeline.codec.params, denoiser=tiny_pipeline.denoiser_params)
    clip = Clip(measured.samples[0].clip.frames, 8, "a dog, which is no shape")
    metrics = {name: value for name, value in measured.metrics.items() if name != "prompt_following"}
    captions = EvaluationResult(metrics, [], [SavedSample(entry(clip, "0.mp4", 1), clip)], [False], [])
    write_run_report(tmp_path / "report.html", pipeline, captions, title="Captions", source=tiny_run)
    text = page(tmp_path / "report.html")
    assert "a dog, which is no shape" in text
    assert text.count("not in training</span>") == 1
    assert "as prompted" not in text
    assert 'class="verdict"' not in text


def test_a_folder_with_a_space_is_quoted(tiny_pipeline, measured, tmp_path):
    write_run_report(tmp_path / "report.html", tiny_pipeline, measured, title="Alone", source=tmp_path / "my run")
    text = html.unescape(page(tmp_path / "report.html"))
    assert f"sample.py '{tmp_path / 'my run'}' --prompt" in text


def test_metrics_on_the_page_are_json(measured):
    assert json.loads(json.dumps(measured.metrics, allow_nan=False))
