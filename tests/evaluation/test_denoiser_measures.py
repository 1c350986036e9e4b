"""Measures of the denoiser on clips of the data, by pipelines."""

import json
from dataclasses import replace

import numpy as np
import pytest

import dit_video
from dit_video.apps.reports.evaluation_report import write_evaluation_report
from dit_video.core.errors import UserError
from dit_video.diffusion import Epsilon
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.comparison import compare
from dit_video.evaluation.denoiser_measures import measure_clips
from dit_video.evaluation.evaluate import evaluate
from dit_video.evaluation.metrics.likelihood import BitsPerDimension, DenoisingLoss, LatentLikelihood, LossByTime
from dit_video.evaluation.protocol import ClipSampling, EvaluationData, EvaluationProtocol
from dit_video.evaluation.protocols import get_protocol
from dit_video.sampling.pipeline import Pipeline
from dit_video.scenes import shapes
from dit_video.tokens import Grid
from dit_video.video import Clip
from support import tiny_pipeline
from support.devices import check_on_eight_devices
from support.html_page import Page
from support.random_params import make_random_params

LOSS = DenoisingLoss(times=(0.25, 0.75))
BITS = LatentLikelihood(steps=2, probes=1, min_ratio=0.01)


def make_clips(*sizes):
    generator = np.random.default_rng(0)
    captions = ("a red circle moving left", "a blue square moving up", "a white triangle")
    return [
        Clip(generator.integers(0, 256, (*size, 3)).astype(np.uint8), fps=8.0, caption=captions[number % 3])
        for number, size in enumerate(sizes)
    ]


CLIPS = make_clips((9, 16, 32), (9, 16, 16), (5, 16, 16))


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline.make_pipeline(tiny_pipeline.make_config(steps=1))


@pytest.mark.nightly
@pytest.mark.parametrize("function", [LOSS, BITS], ids=["loss", "bits"])
def test_values_of_a_clip_depend_on_neither_order_nor_neighbours(pipeline, function):
    together = measure_clips(pipeline, CLIPS, function, seed=0)
    reversed_order = measure_clips(pipeline, CLIPS[::-1], function, seed=0)
    alone = np.concatenate([measure_clips(pipeline, [clip], function, seed=0) for clip in CLIPS])
    np.testing.assert_allclose(reversed_order[::-1], together, rtol=1e-4)
    np.testing.assert_allclose(alone, together, rtol=1e-4)
    assert len(np.unique(together.round(4))) == together.size


def test_another_seed_caption_or_model_has_other_values(pipeline):
    first = measure_clips(pipeline, CLIPS[:1], LOSS, seed=0)
    assert np.abs(measure_clips(pipeline, CLIPS[:1], LOSS, seed=1) - first).max() > 1e-4
    other_caption = replace(CLIPS[0], caption="a green square moving down")
    assert np.abs(measure_clips(pipeline, [other_caption], LOSS, seed=0) - first).max() > 1e-6
    params = tiny_pipeline.make_params(pipeline.config, 7)["denoiser"]
    other = pipeline.replace(denoiser=params)
    assert np.abs(measure_clips(other, CLIPS[:1], LOSS, seed=0) - first).max() > 1e-4


def test_borders_that_do_not_fit_are_cut_off(pipeline):
    (padded,) = make_clips((10, 18, 34))
    cut = replace(padded, frames=padded.frames[:9, 1:17, 1:33])
    np.testing.assert_array_equal(
        measure_clips(pipeline, [padded], LOSS, seed=0), measure_clips(pipeline, [cut], LOSS, seed=0)
    )
    (small,) = make_clips((9, 4, 4))
    with pytest.raises(UserError, match="4x4 pixels are less than"):
        measure_clips(pipeline, [small], LOSS, seed=0)


@pytest.mark.nightly
def test_each_of_two_experts_has_its_times():
    config = tiny_pipeline.make_config(steps=1)
    codec, parts = tiny_pipeline.make_params(config).values()
    other = make_random_params(config.model.backbone.make, 7)
    both = Pipeline(replace(config, boundary=0.5), autoencoder=codec, denoiser={**parts, "low_noise": other})
    clean, noisy = measure_clips(both, CLIPS[:1], LOSS, seed=0)[0]
    for params, value, index in ((parts, noisy, 1), ({**parts, "backbone": other}, clean, 0)):
        single = measure_clips(Pipeline(config, autoencoder=codec, denoiser=params), CLIPS[:1], LOSS, seed=0)[0]
        assert single[index] == pytest.approx(value, rel=1e-5)
        assert abs(single[1 - index] - (clean, noisy)[1 - index]) > 1e-4


@pytest.mark.slow
def test_devices_share_the_rows():
    check_on_eight_devices("denoiser_measures_on_eight_devices.py")


@pytest.mark.slow
def test_the_protocol_measures_clips_without_samples(pipeline, tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("nothing is sampled")

    monkeypatch.setattr(Pipeline, "sample_many", refuse)
    data = tmp_path / "data"
    data.mkdir()
    for number, clip in enumerate(make_clips(*[(9, 16, 32)] * 5)):
        clip.save(data / f"{number}.mp4")
        (data / f"{number}.txt").write_text(clip.caption)
    protocol = EvaluationProtocol(
        name="test",
        clips=ClipSampling(frames=9),
        metrics=(LossByTime(bins=2), BitsPerDimension(steps=2, min_ratio=0.01)),
        real_count=4,
    )
    clips, folders = open_clip_set(data), [tmp_path / "first", tmp_path / "second"]
    first, _ = (evaluate(pipeline, protocol, folder, data=EvaluationData(clips)) for folder in folders)
    assert {each.estimate.count for each in first.results.values()} == {4}
    record = json.loads((folders[0] / "metrics.json").read_text())
    assert (record["samples"], record["real_clips"], record["examples"]) == (0, 4, {})
    losses = [each["denoising_loss"] for each in record["clips"].values()]
    assert np.mean(losses) == pytest.approx(first.results["denoising_loss"].estimate.value)
    assert all("bits_per_dimension" in each for each in record["clips"].values())
    comparison = compare(folders)
    assert [each.value for each in comparison.values["loss_t0.25"]] == [first.results["loss_t0.25"].estimate.value] * 2

    write_evaluation_report(tmp_path / "report.html", first, title="Likelihood")
    text = (tmp_path / "report.html").read_text()
    assert "4 clips of" in text
    assert "Loss by time" in text
    assert [each["aria-label"] for each in Page(text).find("svg", role="img")] == ["denoising loss"]

    coder = make_random_params(pipeline.config.model.autoencoder.make, 5)
    parts = tiny_pipeline.make_params(pipeline.config)["denoiser"]
    other = Pipeline(pipeline.config, autoencoder=coder, denoiser=parts)
    evaluate(other, protocol, tmp_path / "other", data=EvaluationData(clips))
    with pytest.raises(UserError, match="autoencoder"):
        compare([folders[0], tmp_path / "other"])
    noise_config = pipeline.config.replace_model(prediction=Epsilon())
    noise = Pipeline(noise_config, autoencoder=pipeline.codec.params, denoiser=parts)
    evaluate(noise, protocol, tmp_path / "noise", data=EvaluationData(clips))
    with pytest.raises(UserError, match="objective"):
        compare([folders[0], tmp_path / "noise"])
    assert "bits_per_dimension" in compare([folders[0], tmp_path / "noise"], ignored=("objective",)).values


def test_the_number_of_clips_of_the_named_protocol_can_be_chosen():
    protocol = get_protocol("likelihood", count=7)
    assert (protocol.real_count, protocol.count) == (7, None)
    assert (get_protocol("ucf101", count=7).count, get_protocol("ucf101").real_count) == (7, 2048)


@pytest.mark.slow
def test_a_trained_model_is_better_than_an_untrained_one_and_one_of_other_captions():
    trained = dit_video.load("experiments/pretrained/shapes")
    clips = [shapes.render_example(number, seed=5, sizes=(Grid(17, 32, 32),)) for number in range(8)]
    untrained = Pipeline(
        trained.config,
        autoencoder=trained.codec.params,
        denoiser=tiny_pipeline.make_params(trained.config)["denoiser"],
    )
    swapped = [replace(clip, caption=clips[number - 1].caption) for number, clip in enumerate(clips)]
    for function in (LOSS, LatentLikelihood(steps=8, probes=1, min_ratio=0.002)):
        best = measure_clips(trained, clips, function, seed=0).mean(axis=0)
        assert (best < measure_clips(untrained, clips, function, seed=0).mean(axis=0)).all()
        assert (best < measure_clips(trained, swapped, function, seed=0).mean(axis=0)).all()
