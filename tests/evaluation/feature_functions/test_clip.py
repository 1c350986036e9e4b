"""Embeddings of frames and texts by a small CLIP, and the metrics that compare them."""

import numpy as np
import pytest

from dit_video.core.errors import MissingError
from dit_video.evaluation.feature_functions import ClipEmbeddings
from dit_video.evaluation.metrics.captions import ClipSimilarity, EmbeddedSample, TextRetrieval
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.models.features.clip import ClipImageProcessor
from dit_video.video import Clip
from dit_video.weights import save_clip_image_processor
from support.tiny_clip import VISION, write_clip, write_tokenizer

TEXTS = ("a red ball", "a cube", "left left left left")


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    write_tokenizer(folder)
    save_clip_image_processor(folder, ClipImageProcessor(resize=VISION.size, crop=(VISION.size, VISION.size)))
    return ClipEmbeddings(folder=str(folder))


def make_clips(*lengths):
    generator = np.random.default_rng(0)
    return [Clip(generator.integers(0, 256, (length, 12, 16, 3)).astype(np.uint8), fps=8) for length in lengths]


@pytest.mark.slow
def test_embeddings_have_the_length_one_and_batches_do_not_change_them(embeddings):
    frames, texts = embeddings.open().extract(make_clips(2, 1)), embeddings.open_texts()
    np.testing.assert_allclose(np.linalg.norm(frames, axis=1), 1, atol=1e-6)
    together = texts(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(together, np.concatenate([texts([text]) for text in TEXTS]), atol=1e-6)
    assert not np.allclose(together[0], together[1])


@pytest.mark.nightly
def test_similarity_is_the_mean_cosine_of_the_frames(embeddings):
    clips = make_clips(3, 1)
    values = ClipSimilarity(embeddings=embeddings).measure(MetricBatch(samples=clips, prompts=TEXTS[:2]))
    texts = embeddings.open_texts()(TEXTS[:2])
    for value, clip, text in zip(values, clips, texts, strict=True):
        cosines = [embeddings.open().extract([Clip(frame[None], fps=1)])[0] @ text for frame in clip.frames]
        assert value == pytest.approx(np.mean(cosines), abs=1e-6)


def test_retrieval_is_perfect_for_embeddings_of_the_prompts_and_zero_for_equal_ones(embeddings):
    metric, texts = TextRetrieval(embeddings=embeddings, ranks=(1, 2)), embeddings.open_texts()(TEXTS)
    own = tuple(EmbeddedSample(prompt, text) for prompt, text in zip(TEXTS, texts, strict=True))
    assert [each.value for each in metric.compute(own).values()] == [1, 1]
    other = tuple(EmbeddedSample(TEXTS[0], text) for text in texts[1:]) + tuple(
        EmbeddedSample(prompt, texts[0]) for prompt in TEXTS[1:]
    )
    assert metric.compute(other)["recall_at_1"].value == 0
    constant = tuple(EmbeddedSample(prompt, np.zeros_like(texts[0])) for prompt in TEXTS)
    assert metric.compute(constant)["recall_at_1"].value == 0
    assert "of 3 prompts" in metric.compute(own)["recall_at_1"].note


def test_features_are_computed_once_for_all_metrics_of_a_batch(embeddings, monkeypatch):
    opened = embeddings.open()
    calls = []
    monkeypatch.setattr(
        ClipEmbeddings, "open", lambda self: opened._replace(extract=lambda x: calls.append(1) or opened.extract(x))
    )
    batch = MetricBatch(samples=make_clips(2), prompts=TEXTS[:1])
    for metric in (ClipSimilarity(embeddings=embeddings), TextRetrieval(embeddings=embeddings)):
        metric.update(metric.init(), batch.select(metric.needs))
    assert len(calls) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MissingError, match="nowhere"):
        ClipEmbeddings(folder=str(tmp_path / "nowhere")).open()
