import html
import json
from dataclasses import replace

import pytest

from dit_video.apps.reports.run_report import write_run_report
from dit_video.core import config_json
from dit_video.diffusion import SOLVERS, Guidance
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.measure import EvaluationResult, measure
from dit_video.evaluation.protocol import EvaluationItem
from dit_video.experiment.run import EXCLUDED_FILE
from dit_video.sampling import Sampling
from dit_video.sampling.request import Request
from dit_video.scenes import shapes
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from support.attempts import write_attempt


def make_set(clips):
    names = tuple(f"clips/{number}.mp4" for number in range(len(clips)))
    return ClipSet("here", names, tuple(clip.caption for clip in clips), lambda index, fps: clips[index])


@pytest.fixture(scope="module")
def measured(tiny_pipeline, tmp_path_factory):
    """Return an evaluation whose samples are rendered, as by a perfect model."""
    descriptions = [shapes.TRAINING[0], shapes.HELD_OUT[0], shapes.IMAGES[3]]
    clips, items = [], []
    for number, description in enumerate(descriptions):
        frames = 1 if description.direction is None else 9
        geometry = shapes.sample_geometry(
            shapes.rng.make_generator(0, "report", number), description, height=32, width=32
        )
        clips.append(shapes.render(description, geometry, frames=frames, height=32, width=32))
        request = Request(clips[-1].caption, seed=40 + number)
        items.append(EvaluationItem(request, is_trained_caption=number != 1))
    result = measure(
        make_set(clips),
        ShapesEvaluation(),
        tmp_path_factory.mktemp("measured"),
        real_clips=make_set(clips[:1]),
        reconstructions=make_set(clips[:1]),
        model={"parameters": tiny_pipeline.count_parameters()},
    )
    sampling = Sampling(steps=5, guidance=Guidance(scales={"text": 1.5}), solver=SOLVERS["heun"])
    return result._replace(items=tuple(items), sampling=sampling)


def page(path):
    return path.read_text(encoding="utf-8")


def test_the_report_states_the_guidance_of_both_experts(tiny_pipeline, measured, tmp_path):
    measured = measured._replace(sampling=Sampling(guidance=Guidance(scales={"text": (4.0, 3.5)})))
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
    assert "attention      self, Full: dense, without a kernel" in text
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
    assert "What ran" not in text
    assert "dit_video.sampling.pipeline_config:PipelineConfig" in text
    assert str(tiny_run / "pipeline") in text


def test_free_captions_get_no_verdict(tiny_run, tiny_pipeline, measured, tmp_path):
    config = replace(tiny_pipeline.config, evaluation=CaptionEvaluation())
    pipeline = tiny_pipeline.replace(config=config)
    clip = replace(measured.samples.read(0, None), caption="a dog, which is no shape")
    items = (EvaluationItem(Request(clip.caption)),)
    captions = EvaluationResult(
        measured.record | {"examples": {}}, {}, {}, CaptionEvaluation(), make_set([clip]), items=items
    )
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
    assert json.loads(json.dumps(measured.record, allow_nan=False))
