"""VBench's dimensions: what they measure, how their values are named, and what they say without weights."""

from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.errors import MissingError
from dit_video.evaluation.feature_functions import FeatureFunction, OpenFeatures
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.protocols import PROTOCOLS
from dit_video.evaluation.vbench import (
    VBENCH_METRICS,
    AestheticQuality,
    DinoFeatures,
    VbenchClipEmbeddings,
    VbenchSubjectConsistency,
    open_dino,
)
from dit_video.models.features.dino import DinoConfig
from dit_video.video import Clip
from support.random_params import make_random_params
from support.tiny_clip import write_clip


@dataclass(frozen=True, kw_only=True)
class FirstPixels(FeatureFunction):
    """The first 768 values of every frame."""

    def load(self):
        def extract(clips):
            return np.concatenate([clip.frames.reshape(len(clip.frames), -1)[:, :768] / 255 for clip in clips])

        return OpenFeatures(extract, "first pixels", is_of_frames=True)


def make_clips(*lengths):
    generator = np.random.default_rng(0)
    return [Clip(generator.integers(0, 256, (length, 20, 24, 3)).astype(np.uint8), fps=8) for length in lengths]


def test_names_tell_which_values_compare_with_published_ones():
    names = [name for metric in PROTOCOLS["samples"].metrics for name in metric.describe()]
    assert {name for name in names if name.startswith("vbench_")} == {
        "vbench_subject_consistency",
        "vbench_background_consistency",
        "vbench_aesthetic_quality",
    }
    assert "subject_consistency" in names  # with the embeddings of any CLIP
    for metric in VBENCH_METRICS:
        for description in metric.describe().values():
            assert "compares with VBench's tables for samples of its prompts" in description.explanation


def test_the_aesthetic_quality_is_a_tenth_of_the_mean_score_of_the_frames(tmp_path):
    generator = np.random.default_rng(1)
    tensors = {"weight": generator.normal(size=(1, 768)), "bias": generator.normal(size=(1,))}
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "aesthetic.safetensors")
    metric, clips = (
        AestheticQuality(features=FirstPixels(), weights=str(tmp_path / "aesthetic.safetensors")),
        make_clips(3, 1),
    )
    expected = [
        np.mean([frame.ravel()[:768] / 255 @ tensors["weight"][0] + tensors["bias"][0] for frame in clip.frames]) / 10
        for clip in clips
    ]
    assert metric.measure(MetricBatch(samples=clips)) == pytest.approx(expected, rel=1e-4)
    (value,) = metric.compute(metric.update(metric.init(), MetricBatch(samples=clips))).values()
    assert "first pixels, aesthetic predictor " in value.note


def test_frames_are_compared_with_the_first_and_the_previous_one():
    config = DinoConfig(width=24, layers=1, heads=2, mlp_width=32, side=16, patch=8)
    features = open_dino(config, make_random_params(config.make), "small")

    @dataclass(frozen=True, kw_only=True)
    class Small(FeatureFunction):
        def load(self):
            return features

    still, moving = make_clips(1)[0], make_clips(4)[0]
    still = Clip(np.repeat(still.frames, 20, axis=0), fps=8)  # more than a batch
    metric = VbenchSubjectConsistency(features=Small())
    values = metric.measure(MetricBatch(samples=[still, moving, make_clips(1)[0]]))
    rows = features.extract([moving])
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.mean(
        [np.clip(units[index] @ [units[0], units[index - 1]][side], 0, 1) for index in range(1, 4) for side in (0, 1)]
    )
    assert values == [pytest.approx(1, abs=1e-5), pytest.approx(expected, abs=1e-5), None]


@pytest.mark.slow
def test_embeddings_of_the_background_have_the_length_one(tmp_path):
    write_clip(tmp_path)
    rows = VbenchClipEmbeddings(folder=str(tmp_path)).open().extract(make_clips(2, 1))
    assert len(rows) == 3
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_missing_weights_are_named_with_their_recipe(tmp_path):
    with pytest.raises(MissingError, match=r"dino.safetensors.*dino_vitbase16_pretrain.pth.*--to safetensors"):
        DinoFeatures(weights=str(tmp_path / "dino.safetensors")).open()
