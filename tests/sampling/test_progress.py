"""Progress of a pipeline: callbacks, their previews, and the decoder of quick ones in its folder."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.sampling.loading import load_pipeline
from dit_video.sampling.pipeline_config import PREVIEW
from dit_video.sampling.preview import PreviewFit
from dit_video.sampling.progress import SamplingCancelled
from dit_video.sampling.request import Request
from dit_video.sampling.tasks import DescribedEdit
from dit_video.tokens import Grid
from dit_video.video import Clip
from support.latents import generate_latents
from support.tiny_pipeline import SIZE, make_config, make_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:this model was not trained")
OPTIONS = {"size": (5, 16, 16), "steps": 4}


def fit_decoder(pipeline):
    model = pipeline.config.model.autoencoder
    fitted = PreviewFit(model.stride, model.channels)
    latents = np.random.default_rng(0).standard_normal((3, 4, 4, model.channels)).astype(np.float32)
    fitted.add(latents, pipeline.decode(latents).frames)
    return fitted.solve()


@pytest.fixture(scope="module")
def plain():
    return make_pipeline(make_config(steps=4))


@pytest.fixture(scope="module")
def pipeline(plain):
    return plain.with_preview_decoder(fit_decoder(plain))


def test_a_callback_sees_previews_and_may_cancel(plain):
    previews = []

    def watch(progress):
        previews.append((progress.step, progress.steps, progress.preview()[0].frames))

    result = plain.generate("red", size=(5, 16, 16), steps=6, callback=watch)
    assert [(step, steps, frames.shape) for step, steps, frames in previews] == [
        (4, 6, (5, 16, 16, 3)),
        (6, 6, (5, 16, 16, 3)),
    ]
    assert np.abs(previews[-1][2].astype(int) - result.frames).max() <= 1
    with pytest.raises(SamplingCancelled, match="after step 4 of 6"):
        plain.generate("red", size=(5, 16, 16), steps=6, callback=lambda progress: progress.cancel())


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "expected"), [("flow_edit", range(1, 7)), ("inversion", (4, 6, 10, 12))])
def test_a_callback_sees_previews_of_an_edit_and_may_cancel(plain, method, expected):
    frames = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    task = DescribedEdit(Clip(frames, 8), "blue", source="red", edit_method=method, strength=1.0)
    seen, previews = [], []

    def watch(progress):
        seen.append((progress.step, progress.steps))
        previews.append(progress.preview()[0].frames)

    result = plain.run(task, callback=watch, steps=6)
    assert seen == [(step, expected[-1]) for step in expected]
    assert np.abs(previews[-1].astype(int) - result.frames).max() <= 1
    assert (previews[0] != previews[-1]).any()
    with pytest.raises(SamplingCancelled, match=f"after step {expected[0]} of {expected[-1]}"):
        plain.run(task, callback=lambda progress: progress.cancel(), steps=6)


def list_previews(pipeline, run, **options):
    """Return the quick previews that a callback of `run` gets, and those of the latents that it gets."""
    quick, expected = [], []

    def watch(progress):
        (clip,) = progress.quick_preview(**options).values()
        (latents,) = progress.progress.estimate_latents().values()
        quick.append(clip)
        expected.append(pipeline.preview_decoder.decode(latents, fps=clip.fps, **options))

    run(watch)
    return quick, expected


def test_a_callback_gets_quick_previews(pipeline):
    def run(callback):
        pipeline.generate("red", callback=callback, **OPTIONS)

    for options, size in (({}, (5, 16, 16)), ({"max_side": 8}, (5, 8, 8))):
        quick, expected = list_previews(pipeline, run, **options)
        assert quick
        for clip, other in zip(quick, expected, strict=True):
            assert clip.frames.shape == (*size, 3)
            assert clip.fps == pipeline.config.fps
            np.testing.assert_array_equal(clip.frames, other.frames)


def test_previews_have_the_numbers_of_their_requests(pipeline):
    seen = []
    requests = [Request("red", (5, 16, 16)), Request("blue", (5, 16, 16), seed=1)]
    sampling = pipeline.make_sampling(steps=2)
    watch = {"callback": lambda progress: seen.append(progress.quick_preview())}
    pipeline.generate_many(requests, sampling=sampling, **watch)
    assert set().union(*seen) == {0, 1}


def test_a_callback_of_latents_gets_them_too(pipeline):
    quick = []
    generate_latents(pipeline, "red", callback=lambda progress: quick.append(progress.quick_preview()[0]), **OPTIONS)
    assert quick[-1].frames.shape == (5, 16, 16, 3)


@pytest.mark.parametrize("method", [pytest.param("flow_edit", marks=pytest.mark.nightly), "inversion"])
def test_steps_of_an_edit_have_quick_previews_at_the_rate_of_the_clip(pipeline, method):
    frames = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)

    def run(callback):
        task = DescribedEdit(Clip(frames, 12), "blue", source="red", edit_method=method)
        pipeline.run(task, steps=2, callback=callback)

    quick, expected = list_previews(pipeline, run)
    assert quick[-1].fps == 12
    assert quick[-1].frames.shape == frames.shape
    np.testing.assert_array_equal(quick[-1].frames, expected[-1].frames)


def test_a_pipeline_without_a_preview_decoder_says_how_to_get_one(plain):
    assert plain.preview_decoder is None
    with pytest.raises(UserError, match=r"no preview decoder.*fit_preview_decoder\.py"):
        plain.generate("red", callback=lambda progress: progress.quick_preview(), **OPTIONS)


def test_derived_pipelines_keep_the_decoder(pipeline, plain):
    assert plain.preview_decoder is None
    for derived in (pipeline.with_attention("dense"), pipeline.with_decoding(memory=2**30)):
        assert derived.preview_decoder is pipeline.preview_decoder
    assert pipeline.with_preview_decoder(None).preview_decoder is None


def test_a_folder_holds_the_decoder(pipeline, plain, tmp_path):
    pipeline.save(tmp_path / "a")
    loaded = load_pipeline(tmp_path / "a")
    latents = np.random.default_rng(1).standard_normal((3, 4, 4, pipeline.config.model.autoencoder.channels))
    frames = [each.preview_decoder.decode(latents, fps=8).frames.astype(int) for each in (pipeline, loaded)]
    assert np.abs(frames[0] - frames[1]).max() <= 1
    loaded.save(tmp_path / "b")
    assert (tmp_path / "b" / PREVIEW).read_bytes() == (tmp_path / "a" / PREVIEW).read_bytes()
    plain.save(tmp_path / "a")
    assert not (tmp_path / "a" / PREVIEW).exists()
    assert load_pipeline(tmp_path / "a").preview_decoder is None


def test_a_decoder_of_another_autoencoder_is_refused(pipeline):
    model = pipeline.config.model.autoencoder
    fitted = PreviewFit(Grid(1, 2, 2), model.channels)
    fitted.add(np.zeros((1, 2, 2, model.channels)), np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"\[1, 2, 2\].*fitted to it"):
        pipeline.with_preview_decoder(fitted.solve())
