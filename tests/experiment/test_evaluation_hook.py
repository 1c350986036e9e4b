"""Evaluation during training: values of the samples at each interval, computed while training goes on."""

import json
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from dit_video.core.registry import register
from dit_video.data.sizes import SizeLimits
from dit_video.evaluation.config import Evaluation
from dit_video.evaluation.metrics.frames import Sharpness
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.metrics.reconstruction import Psnr
from dit_video.evaluation.requests import EvaluationClips, EvaluationRequest
from dit_video.experiment.evaluation_hook import EvaluationHook
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from support import tiny_pipeline


@register
@dataclass(frozen=True, kw_only=True)
class TwoPrompts(Evaluation):
    """Two samples."""

    def make_requests(self, clips, seed, *, image):
        return [
            EvaluationRequest(Request(prompt, Grid(5, 16, 16), seed=number), read_reference=lambda: None)
            for number, prompt in enumerate(("a red circle", "a blue square"))
        ]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline.make_pipeline(tiny_pipeline.make_config(steps=1))


def make_hook(folder, pipeline):
    return EvaluationHook(
        folder,
        every=10,
        evaluation=TwoPrompts(metrics=(Sharpness(), Psnr())),
        clips=EvaluationClips((), (), SizeLimits(max_pixels=4096, max_frames=9, multiple=Grid(4, 8, 8)), lambda: None),
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
    assert not (tmp_path / "step_10").exists()
    measured.set()
    hook.close()
    values = hook.derive({})
    record = json.loads((tmp_path / "step_10" / "metrics.json").read_text())
    (result,) = record["results"]
    assert result["count"] == 2
    assert values == {"evaluation_sharpness": result["value"], "evaluation_step": 10}
    assert record["protocol"]["sampling"]["steps"] == 1
    requests = [each.request for each in TwoPrompts().make_requests(None, 0, image=False)]
    clips = decode(pipeline.generate_latents(requests), requests)
    batch = MetricBatch(samples=clips)
    assert np.mean(Sharpness().measure(batch)) == pytest.approx(result["value"], rel=1e-5)


def test_an_error_of_a_measurement_ends_the_training(tmp_path, pipeline, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(pipeline, "decode_many", fail)
    hook = make_hook(tmp_path, pipeline)
    hook.call(10, SimpleNamespace(ema={}))
    with pytest.raises(OSError, match="disk full"):
        hook.close()
