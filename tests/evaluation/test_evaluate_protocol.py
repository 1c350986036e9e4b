"""Evaluation of a model by a protocol: samples that are made once and reused, and reconstructions."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.diffusion import Guidance
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.comparison import compare
from dit_video.evaluation.evaluate_protocol import SAMPLES_FOLDER, evaluate_protocol, make_requests
from dit_video.evaluation.metrics.distributions import PrecisionRecall
from dit_video.evaluation.metrics.frames import Sharpness
from dit_video.evaluation.metrics.reconstruction import Psnr
from dit_video.evaluation.protocol import ClipSampling, Protocol, check_comparable
from dit_video.evaluation.sample_store import SampleStore
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request
from dit_video.scenes.prompt_metrics import SceneColours
from dit_video.scenes.protocols import SceneProtocol
from dit_video.tokens import Grid
from dit_video.video import Clip
from support import tiny_pipeline
from support.colour_features import ColourFeatures

PROTOCOL = Protocol(
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
    return open_clip_set(folder)


def count_sampled(monkeypatch):
    """Return the list of the numbers of requests that are sampled from now on."""
    sampled, generate = [], Pipeline.generate_latents

    def count(self, requests, **options):
        sampled.append(len(requests))
        return generate(self, requests, **options)

    monkeypatch.setattr(Pipeline, "generate_latents", count)
    return sampled


def test_requests_have_every_caption_and_the_models_size(pipeline, data):
    requests, numbers = make_requests(pipeline, PROTOCOL, data)
    assert sorted(numbers) == [0, 0, 1, 2, 3, 4]
    assert {request.size for request in requests} == {Grid(9, 16, 32)}
    assert [request.prompt for request in requests] == [data.captions[number] for number in numbers]
    assert len({request.seed for request in requests}) == 6
    uncaptioned = data._replace(captions=("", *data.captions[1:]))
    with pytest.raises(UserError, match=r"1 of 5 clips .* no caption, such as 0\.mp4"):
        make_requests(pipeline, PROTOCOL, uncaptioned)


@pytest.mark.nightly
def test_samples_are_made_once_and_go_on_after_a_kill(pipeline, data, tmp_path, monkeypatch):
    sampled = count_sampled(monkeypatch)
    first = evaluate_protocol(pipeline, PROTOCOL, tmp_path, data=data)
    assert sum(sampled) == 6
    files = sorted((tmp_path / SAMPLES_FOLDER / "test").glob("*.mp4"))
    contents = [file.read_bytes() for file in files]
    sampled.clear()
    for file in files[2:4]:
        file.unlink()
    (files[0].parent / ".000007.partial").write_bytes(b"a killed writer's")
    other = replace(PROTOCOL, metrics=(Sharpness(),))
    again = evaluate_protocol(pipeline, other, tmp_path, data=data)
    assert sum(sampled) == 2
    assert [file.read_bytes() for file in files] == contents
    value = first.measurement.results["sharpness"].estimate
    assert again.measurement.results["sharpness"].estimate == value
    assert value.count == 6
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["protocol"]["sampling"]["steps"] == 1
    assert record["model"]["weights"] == pipeline.compute_digest()


@pytest.mark.nightly
def test_values_of_another_average_are_not_comparable(pipeline, data, tmp_path):
    folders = [tmp_path / "own", tmp_path / "short"]
    for folder, average in zip(folders, ({"ema": None}, {"ema": 0.9}), strict=True):
        evaluate_protocol(pipeline, PROTOCOL, folder, data=data, average=average)
    with pytest.raises(UserError, match=r"protocol\.average\.ema"):
        compare(folders)
    assert len(compare(folders, ignored=("average",)).names) == 2


def test_samples_of_other_settings_are_refused_and_kept(pipeline, data, tmp_path):
    evaluate_protocol(pipeline, PROTOCOL, tmp_path, data=data)
    files = sorted((tmp_path / SAMPLES_FOLDER / "test").glob("*.mp4"))
    with pytest.raises(UserError, match=r"made otherwise: settings\.sampling\.steps is 1 there and 2 here"):
        evaluate_protocol(pipeline, PROTOCOL, tmp_path, data=data, sampling=pipeline.make_sampling(steps=2))
    with pytest.raises(UserError, match="made otherwise"):
        evaluate_protocol(pipeline, replace(PROTOCOL, count=5), tmp_path, data=data)
    trained = tiny_pipeline.make_pipeline(tiny_pipeline.make_config(steps=1))
    assert trained.compute_digest() == pipeline.compute_digest()
    denoiser = tiny_pipeline.make_params(pipeline.config, 7)["denoiser"]
    other = Pipeline(pipeline.config, autoencoder=pipeline.codec.params, denoiser=denoiser)
    with pytest.raises(UserError, match=r"settings\.weights"):
        evaluate_protocol(other, PROTOCOL, tmp_path, data=data)
    assert all(file.is_file() for file in files)


def test_another_number_of_samples_is_named_and_their_prompts_are_not(tmp_path):
    requests = [Request(f"prompt {number}", Grid(1, 8, 8), number) for number in range(3)]
    SampleStore(tmp_path / "samples", requests[:2], {"weights": "a"})
    SampleStore(tmp_path / "samples", requests[:2], {"weights": "a"})
    with pytest.raises(UserError, match=r"2 samples there and 3 here, settings\.weights is 'a' there") as error:
        SampleStore(tmp_path / "samples", requests, {"weights": "b"})
    assert "prompt 0" not in str(error.value)


def test_samples_are_continued_and_compared_whose_guidance_was_written_as_fields(tmp_path):
    """Before guidance had names, it was written as `scale`, `image_scale`, `projection` and `zero_star`."""
    sampling = Sampling(steps=2, guidance=Guidance(scales={"text": 3.0, "image": 2.0}))
    settings = {"sampling": config_json.to_json(sampling)}
    SampleStore(tmp_path / "samples", [], settings)
    path = tmp_path / "samples" / "settings.json"
    written = json.loads(path.read_text())
    guidance = written["settings"]["sampling"]["guidance"]
    del guidance["scales"], guidance["method"]
    guidance |= {"scale": 3.0, "image_scale": 2.0, "projection": None, "zero_star": None}
    path.write_text(json.dumps(written))
    SampleStore(tmp_path / "samples", [], settings)
    check_comparable(written["settings"], settings, names=("one", "other"))
    guidance["scale"] = 4.0
    path.write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"sampling\.guidance\.scales\.text is 4\.0 there and 3\.0 here"):
        SampleStore(tmp_path / "samples", [], settings)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files than samples"):
        SampleStore(tmp_path, [], {})


def test_reconstructions_are_those_of_the_autoencoder(pipeline, data, tmp_path):
    protocol = Protocol(name="reconstruction", metrics=(Psnr(),), clips=ClipSampling(frames=9))
    result = evaluate_protocol(pipeline, protocol, tmp_path, data=data)
    stride = pipeline.config.model.autoencoder.stride
    assert result.protocol.clips.multiple == tuple(stride)
    cut = result.protocol.clips.sample(data.read(2, None), seed=0, number=2)
    assert (cut.height % stride.h, cut.width % stride.w) == (0, 0)
    np.testing.assert_array_equal(result.samples.read(2, None).frames, pipeline.codec.reconstruct(cut).frames)
    assert result.measurement.results["psnr"].estimate.count == 5


def test_scenes_need_no_data_and_give_their_truths(pipeline, tmp_path):
    metrics = (SceneColours(), PrecisionRecall(features=ColourFeatures()))
    protocol = SceneProtocol(name="scenes", metrics=metrics, count=5, sizes=(Grid(9, 32, 32),))
    result = evaluate_protocol(pipeline, protocol, tmp_path)
    results = result.measurement.results
    assert results["scene_colours"].estimate.count == 5
    assert results["recall"].estimate.count == 5
    true = [protocol.clips.sample(result.real_clips.read(number, None), seed=0, number=number) for number in range(5)]
    assert {clip.frames.shape for clip in true} == {(9, 32, 32, 3)}


def test_a_protocol_without_data_says_so(pipeline, tmp_path):
    with pytest.raises(UserError, match="--data"):
        evaluate_protocol(pipeline, PROTOCOL, tmp_path)
