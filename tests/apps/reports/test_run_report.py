import html
import json
from dataclasses import replace

import pytest

from dit_video.apps.reports.run_report import write_run_report
from dit_video.core import config_json
from dit_video.evaluation.collection import MetricCollection
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.evaluate import EvaluationResult, SavedSample
from dit_video.evaluation.metrics.metric import CLIP_NEEDS, PROMPT_NEEDS, ClipReconstruction, MetricBatch
from dit_video.experiment.run import EXCLUDED_FILE
from dit_video.sampling.pipeline import Pipeline
from dit_video.scenes import shapes
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from dit_video.video import Clip
from support.attempts import write_attempt


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
    reconstruction = ClipReconstruction("clips/7.mp4", original, original)
    collection = MetricCollection(ShapesEvaluation().metrics)
    collection.update(MetricBatch(samples=[clip for _, clip in samples], prompts=[one["prompt"] for one, _ in samples]))
    collection.update(MetricBatch(pairs=[reconstruction]))
    metrics = {
        "parameters": tiny_pipeline.count_parameters(),
        "sampling": {"samples": 3, "seed": 0, "steps": 5, "guidance": 1.5, "solver": "heun", "seconds": 1.0},
        "clips": collection.list_examples(["clips/7.mp4"], CLIP_NEEDS),
        "samples": collection.list_examples([one["file"] for one, _ in samples], PROMPT_NEEDS),
    }
    return EvaluationResult(metrics, collection.compute(), [reconstruction], samples, [True, False, True])


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
    assert "PSNR <b>100.0 dB</b> · SSIM <b>1.000</b>" in " ".join(text.split())
    assert "95 % interval 43.9% to 100.0%; 3 examples" in text
    assert '<th scope="row">colour_never_seen</th>' in text
    assert "20.7% to 100.0%" in text
    assert "100.00 dB" in text
    assert text.count(">higher</td>") == 25
    assert text.count('aria-label="colour: as prompted"') == 3
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


def test_the_report_shows_where_the_time_of_all_attempts_went(tiny_pipeline, measured, tmp_path):
    write_attempt(tmp_path, 1, 1000, 0, 60, compile=30)
    write_attempt(tmp_path, 2, 1200, 40, 100)
    write_run_report(tmp_path / "report.html", tiny_pipeline, measured, title="A run", source=tmp_path)
    text = " ".join(page(tmp_path / "report.html").split())
    assert ">Where the time went</h2>" in text
    assert '<span class="value">37.0 %</span>' in text  # 100 of 270 s
    assert "training steps, of 4 min, 20 steps taken again" in text
    assert "not running for" in text
    assert "in 2 attempts" in text


def test_the_report_names_the_clips_that_a_run_excluded(tiny_pipeline, measured, tmp_path):
    excluded = {"training": {"clips": 100, "excluded": {"clips/icon.png": "8x16 pixels, less than one multiple"}}}
    for folder in (tmp_path, tmp_path / "stages" / "small"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / EXCLUDED_FILE).write_text(json.dumps(excluded))
    write_run_report(tmp_path / "report.html", tiny_pipeline, measured, title="A run", source=tmp_path)
    text = " ".join(page(tmp_path / "report.html").split())
    assert "such as clips/icon.png: 8x16 pixels, less than one multiple" in text
    assert "1 of 100" in text
    assert "excluded training clips, stage small" in text
    assert text.count("clips/icon.png") == 4  # twice among the figures, twice in the tables


def test_a_pipeline_without_a_run_has_no_curves(tiny_run, tiny_pipeline, measured, tmp_path):
    write_run_report(tmp_path / "report.html", tiny_pipeline, measured, title="Alone", source=tiny_run / "pipeline")
    text = page(tmp_path / "report.html")
    assert ">Training" not in text
    assert "whole run" not in text
    assert "Where the time went" not in text
    assert "dit_video.sampling.pipeline_config:PipelineConfig" in text
    assert str(tiny_run / "pipeline") in text


def test_free_captions_get_no_verdict(tiny_run, tiny_pipeline, measured, tmp_path):
    config = replace(tiny_pipeline.config, evaluation=CaptionEvaluation())
    pipeline = Pipeline(config, autoencoder=tiny_pipeline.codec.params, denoiser=tiny_pipeline.denoiser_params)
    clip = Clip(measured.samples[0].clip.frames, 8, "a dog, which is no shape")
    metrics = measured.metrics | {"clips": {}, "samples": {"0.mp4": {}}}
    captions = EvaluationResult(metrics, {}, [], [SavedSample(entry(clip, "0.mp4", 1), clip)], [False])
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
