"""Evaluation of a model by a protocol: samples that are made once and reused, and reconstructions."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.registry import register
from dit_video.evaluation.clip_set import NO_CLIPS, open_clip_set
from dit_video.evaluation.comparison import compare
from dit_video.evaluation.evaluate import SAMPLES_FOLDER, evaluate
from dit_video.evaluation.metrics.distributions import PrecisionRecall
from dit_video.evaluation.metrics.frames import Sharpness
from dit_video.evaluation.metrics.reconstruction import Psnr
from dit_video.evaluation.protocol import (
    ClipSampling,
    EvaluationData,
    EvaluationItem,
    EvaluationProtocol,
    ReconstructionProtocol,
)
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.sampling.tasks import Generate
from dit_video.sampling.tasks.task_file import TaskEntry
from dit_video.scenes.prompt_metrics import SceneColours
from dit_video.scenes.protocols import SceneProtocol
from dit_video.scenes.shape_metrics import PromptFollowing
from dit_video.tokens import Grid
from dit_video.video import Clip
from support import tiny_pipeline
from support.colour_features import ColourFeatures
from support.tiny_pipeline import read_captions_of_scenes

PROTOCOL = EvaluationProtocol(
    name="test",
    metrics=(Sharpness(), PrecisionRecall(features=ColourFeatures())),
    clips=ClipSampling(frames=6, size=(16, 16)),
    count=6,
)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline.make_pipeline(tiny_pipeline.make_config(steps=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for number in range(5):
        frames = generator.integers(0, 256, (9, 20, 34, 3)).astype(np.uint8)
        Clip(frames, fps=8).save(folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(f"a red circle, number {number}")
    return EvaluationData(open_clip_set(folder))


def count_sampled(monkeypatch):
    """Return the list of the numbers of requests that are sampled from now on."""
    sampled, generate = [], Pipeline.sample_many

    def count(self, requests, **options):
        sampled.append(len(requests))
        return generate(self, requests, **options)

    monkeypatch.setattr(Pipeline, "sample_many", count)
    return sampled


def test_requests_have_every_caption_and_the_models_size(pipeline, data):
    items = PROTOCOL.make_items(pipeline, data)
    requests, captions = [item.entry for item in items], list(data.clips.captions)
    assert sorted(request.prompt for request in requests) == sorted([captions[0], *captions])
    assert {request.size for request in requests} == {Grid(9, 16, 32)}
    assert len({request.seed for request in requests}) == 6
    for item in items:
        true = data.clips.read(captions.index(item.entry.prompt), None)
        np.testing.assert_array_equal(item.read_reference().frames, true.frames)
    uncaptioned = EvaluationData(data.clips._replace(captions=("", *captions[1:])))
    with pytest.raises(UserError, match=r"1 of 5 clips .* no caption, such as 0\.mp4"):
        PROTOCOL.make_items(pipeline, uncaptioned)


@pytest.mark.nightly
def test_samples_are_made_once_and_go_on_after_a_kill(pipeline, data, tmp_path, monkeypatch):
    sampled = count_sampled(monkeypatch)
    first = evaluate(pipeline, PROTOCOL, tmp_path, data=data)
    assert sum(sampled) == 6
    files = sorted((tmp_path / SAMPLES_FOLDER).glob("*.mp4"))
    contents = [file.read_bytes() for file in files]
    sampled.clear()
    for file in files[2:4]:
        file.unlink()
    (files[0].parent / ".000007.partial").write_bytes(b"a killed writer's")
    other = replace(PROTOCOL, metrics=(Sharpness(),))
    again = evaluate(pipeline, other, tmp_path, data=data)
    assert sum(sampled) == 2
    assert [file.read_bytes() for file in files] == contents
    value = first.results["sharpness"].estimate
    assert again.results["sharpness"].estimate == value
    assert value.count == 6
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["protocol"]["sampling"]["steps"] == 1
    assert record["model"]["weights"] == pipeline.compute_digest()


@pytest.mark.nightly
def test_values_of_another_average_are_not_comparable(pipeline, data, tmp_path):
    folders = [tmp_path / "own", tmp_path / "short"]
    for folder, average in zip(folders, ({"ema": None}, {"ema": 0.9}), strict=True):
        evaluate(pipeline, PROTOCOL, folder, data=data, average=average)
    with pytest.raises(UserError, match=r"protocol\.average\.ema"):
        compare(folders)
    assert len(compare(folders, ignored=("average",)).names) == 2


def test_samples_of_other_settings_are_refused_and_kept(pipeline, data, tmp_path):
    evaluate(pipeline, PROTOCOL, tmp_path, data=data)
    files = sorted((tmp_path / SAMPLES_FOLDER).glob("*.mp4"))
    with pytest.raises(UserError, match=r"made otherwise: settings\.sampling\.steps is 1 there and 2 here"):
        evaluate(pipeline, PROTOCOL, tmp_path, data=data, sampling=pipeline.make_sampling(steps=2))
    with pytest.raises(UserError, match="made otherwise"):
        evaluate(pipeline, replace(PROTOCOL, count=5), tmp_path, data=data)
    trained = tiny_pipeline.make_pipeline(tiny_pipeline.make_config(steps=1))
    assert trained.compute_digest() == pipeline.compute_digest()
    denoiser = tiny_pipeline.make_params(pipeline.config, 7)["denoiser"]
    with pytest.raises(UserError, match="denoiser has 'bakbone', which is no part of it"):
        pipeline.replace(denoiser={"bakbone": denoiser["backbone"]})
    other = pipeline.replace(denoiser=denoiser)
    with pytest.raises(UserError, match=r"settings\.weights"):
        evaluate(other, PROTOCOL, tmp_path, data=data)
    assert all(file.is_file() for file in files)
    replaced = evaluate(other, PROTOCOL, tmp_path, data=data, replace_samples=True)
    assert replaced.record["model"]["weights"] == other.compute_digest()
    assert replaced.seconds > 0


def test_reconstructions_are_those_of_the_autoencoder(pipeline, data, tmp_path):
    protocol = ReconstructionProtocol(name="reconstruction", metrics=(Psnr(),), clips=ClipSampling(frames=9))
    result = evaluate(pipeline, protocol, tmp_path, data=data)
    stride = pipeline.config.model.autoencoder.stride
    assert result.protocol.clips.multiple == tuple(stride)
    cut = result.protocol.clips.sample(data.clips.read(2, None), seed=0, number=2)
    assert (cut.height % stride.h, cut.width % stride.w) == (0, 0)
    np.testing.assert_array_equal(result.samples.read(2, None).frames, pipeline.codec.reconstruct(cut).frames)
    assert result.results["psnr"].estimate.count == 5


def test_scenes_need_no_data_and_give_their_truths(pipeline, tmp_path):
    metrics = (SceneColours(), PrecisionRecall(features=ColourFeatures()))
    protocol = SceneProtocol(name="scenes", metrics=metrics, count=5, sizes=(Grid(9, 32, 32),))
    pipeline = pipeline.replace(config=read_captions_of_scenes(pipeline.config))
    result = evaluate(pipeline, protocol, tmp_path)
    results = result.results
    assert results["scene_colours"].estimate.count == 5
    assert results["recall"].estimate.count == 5
    true = [protocol.clips.sample(result.real_clips.read(number, None), seed=0, number=number) for number in range(5)]
    assert {clip.frames.shape for clip in true} == {(9, 32, 32, 3)}


def test_reconstructions_take_the_place_of_samples_for_metrics_of_these_alone(pipeline, data, tmp_path):
    protocol = ReconstructionProtocol(name="reconstruction", metrics=(Sharpness(),))
    assert evaluate(pipeline, protocol, tmp_path, data=data).results["sharpness"].estimate.count == 5


@register
@dataclass(frozen=True, kw_only=True)
class TwoEntries(EvaluationProtocol):
    """A prompt, and a request or a task."""

    second: Any

    def make_data(self, data):
        return EvaluationData(NO_CLIPS)

    def make_items(self, pipeline, data):
        return [EvaluationItem(Request("a red circle moving left")), EvaluationItem(self.second)]


@pytest.mark.parametrize("entry", [Request(""), TaskEntry(Generate())])
def test_metrics_of_prompts_are_refused_before_an_item_without_one_is_sampled(pipeline, tmp_path, monkeypatch, entry):
    sampled = count_sampled(monkeypatch)
    protocol = TwoEntries(name="two", metrics=(PromptFollowing(),), second=entry)
    with pytest.raises(UserError, match=r"it needs prompts\. Give each clip a caption"):
        evaluate(pipeline, protocol, tmp_path)
    assert not sampled
    assert not list(tmp_path.iterdir())


def test_samples_that_are_too_short_to_be_measured_are_refused_before_they_are_made(
    pipeline, data, tmp_path, monkeypatch
):
    sampled = count_sampled(monkeypatch)
    short = data._replace(clips=data.clips._replace(get_size=lambda _: (5, 16, 32)))
    with pytest.raises(UserError, match=r"frames=6 of .* 6 of 6 samples have fewer\. Use 5"):
        evaluate(pipeline, PROTOCOL, tmp_path, data=short)
    assert not sampled
    evaluate(pipeline, replace(PROTOCOL, clips=ClipSampling(frames=5, size=(16, 16))), tmp_path, data=short)
    assert sampled


def test_a_protocol_without_data_says_so(pipeline, tmp_path):
    with pytest.raises(UserError, match="--data"):
        evaluate(pipeline, PROTOCOL, tmp_path)
