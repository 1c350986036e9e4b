"""Rules of all metrics: merged states, described values, and results that no other metric changes."""

import dataclasses
import functools

import numpy as np
import pytest

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.evaluation.collection import MetricCollection
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.metrics.metric import (
    PROMPT_NEEDS,
    ClipReconstruction,
    MeanMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    ShareMetric,
    estimate_mean,
    estimate_share,
)
from dit_video.evaluation.metrics.reconstruction import LinearPsnr, Psnr, Ssim, psnr, ssim
from dit_video.evaluation.metrics.tasks import KeptPixels, RegionBorder
from dit_video.scenes import draw_scene, shapes
from dit_video.scenes.laws import LAWS
from dit_video.scenes.protocols import PHYSICS_METRICS, SCENE_PROMPT_METRICS, SceneProtocol
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from dit_video.scenes.tasks import TaskTruth
from dit_video.tokens import Grid
from dit_video.video import Clip
from support.physics_truths import make_physics_truths

METRICS = ShapesEvaluation().metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneColumn(MeanMetric):
    """Mean column at which the shapes of the references start."""

    needs, name = ("scenes",), "column"
    description = MetricDescription(label="column")

    def measure(self, batch):
        assert (batch.samples, batch.references, batch.pairs, batch.pipeline) == ((), (), (), None)
        return [geometry.column for _, geometry in batch.scenes]


def make_batch(*indices):
    clips = [shapes.render_example(index, seed=1) for index in indices]
    others = [dataclasses.replace(clip, frames=255 - clip.frames) for clip in clips]
    pairs = [ClipReconstruction(str(number), *pair) for number, pair in enumerate(zip(clips, others, strict=True))]
    scenes = [shapes.draw_example(index, seed=1)[:2] for index in indices]
    prompts = [clip.caption for clip in clips]
    return MetricBatch(samples=clips, prompts=prompts, pairs=pairs, baselines=clips, scenes=scenes)


@pytest.mark.parametrize("metric", [*METRICS, SceneColumn()], ids=lambda metric: type(metric).__name__)
def test_a_merged_state_is_that_of_all_examples(metric):
    batches = [make_batch(0, 1, 2).select(metric.needs), make_batch(3, 4).select(metric.needs)]
    whole = functools.reduce(metric.update, batches, metric.init())
    parts = [metric.update(metric.init(), batch) for batch in batches]
    values = metric.compute(whole)
    assert metric.compute(metric.merge(*parts)) == values
    assert metric.compute(metric.merge(metric.init(), whole)) == values
    assert list(values) == list(metric.describe())
    assert {each.count for each in metric.compute(metric.init()).values()} == {0}
    assert {each.value for each in metric.compute(metric.init()).values()} == {None}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_no_metric_changes_another(metric):
    batch = make_batch(0, 1, 2, 3)
    alone, together = MetricCollection([metric]), MetricCollection(METRICS)
    for collection in (alone, together):
        collection.update(batch)
    assert alone.compute().items() <= together.compute().items()


def test_metrics_of_a_batch_share_what_they_derive_from_a_clip():
    calls = []

    def measure_brightness(clip, scale, *, offset=0.0):
        calls.append((clip, scale, offset))
        return scale * float(clip.frames.mean()) + offset

    batch = make_batch(0, 1)
    first, second = batch.samples
    metrics = [batch.select(("samples",)), batch.select(("samples", "prompts")), batch]
    assert len({each.derive(measure_brightness, first, 2.0) for each in metrics}) == 1
    assert calls == [(first, 2.0, 0.0)]
    # Another clip, argument or function is another value, and so is a clip of a batch of its own.
    assert batch.derive(measure_brightness, second, 2.0) == 2 * second.frames.mean()
    assert batch.derive(measure_brightness, first, 3.0, offset=1.0) == 3 * first.frames.mean() + 1
    assert batch.derive(lambda clip, scale: scale, first, 2.0) == 2.0
    assert MetricBatch(samples=[first]).derive(measure_brightness, first, 2.0) == 2 * first.frames.mean()
    assert len(calls) == 4


@pytest.mark.parametrize("metric", [*SCENE_PROMPT_METRICS, *PHYSICS_METRICS], ids=lambda metric: type(metric).__name__)
def test_scene_metrics_alone_are_those_of_a_shared_batch(metric, scene_batch):
    batch, results = scene_batch
    alone = MetricCollection([metric])
    alone.update(MetricBatch(samples=batch.samples, scenes=batch.scenes))
    assert alone.compute().items() <= results.items()


@pytest.fixture(scope="module")
def scene_batch():
    """Return scenes for the prompt and of every law, and the results of all metrics together."""
    protocol = SceneProtocol(name="four", metrics=SCENE_PROMPT_METRICS, count=4, seed=3, sizes=(Grid(9, 32, 48),))
    clips = protocol.make_data(None).clips
    truths = clips.truths
    lawful = [truth for law in LAWS for truth in make_physics_truths(law, count=1, seed=5)]
    samples = [*(clips.read(number, None) for number in range(4)), *(truth.reference for truth in lawful)]
    batch = MetricBatch(samples=samples, scenes=[*truths, *lawful])
    together = MetricCollection((*SCENE_PROMPT_METRICS, *PHYSICS_METRICS))
    together.update(batch)
    return batch, together.compute()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DarkSamples(ShareMetric):
    """Share of samples that are dark, of those that are neither black nor white."""

    needs, name = ("samples",), "dark"
    description = MetricDescription(label="dark", unit="%")

    def measure(self, batch):
        means = [clip.frames.mean() for clip in batch.samples]
        return [bool(mean < 128) if 0 < mean < 255 else None for mean in means]

    def make_note(self, state):
        return f"without {state.count(None)}"


def test_examples_without_a_measurement_do_not_count_and_keep_their_place():
    clips = [Clip(np.full((2, 8, 8, 3), level, np.uint8), fps=8) for level in (0, 10, 255, 20, 200)]
    metric = DarkSamples()
    collection = MetricCollection((metric,))
    collection.update(MetricBatch(samples=clips))
    estimate = collection.compute()["dark"].estimate
    assert (estimate.value, estimate.count, estimate.note) == (pytest.approx(2 / 3), 3, "without 2")
    assert estimate.interval == estimate_share([True, True, False]).interval
    rows = collection.list_examples("abcde", PROMPT_NEEDS)
    assert rows == {"a": {}, "b": {"dark": True}, "c": {}, "d": {"dark": True}, "e": {"dark": False}}
    assert metric.compute((None, None))["dark"] == MetricValue(
        value=None, interval=(0.0, 1.0), count=0, note="without 2"
    )
    assert estimate_mean([]).value is None
    assert estimate_mean([1.0, 2.0]).value == 1.5


def test_samples_that_keep_no_pixels_are_no_example_of_their_metrics():
    pixels = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16, 3), np.uint8)
    clip, other = (Clip(frames, fps=8) for frames in pixels)
    scene = draw_scene(0, seed=0, level=1, sizes=(Grid(3, 32, 32),))
    is_known = np.zeros((3, 16, 16), bool)
    is_known[:, :, :8] = True
    parts = {"scene": scene, "reference": clip, "reconstruction": clip}
    scenes = [TaskTruth(**parts, is_known=is_known), TaskTruth(**parts)]
    collection = MetricCollection((KeptPixels(), RegionBorder()))
    collection.update(MetricBatch(samples=[other, other], scenes=scenes))
    rows = collection.list_examples(("kept", "free"), PROMPT_NEEDS)
    assert rows["kept"].keys() == {"kept_psnr_loss", "border_gradient"}
    assert rows["free"] == {}
    assert {each.estimate.count for each in collection.compute().values()} == {1}


def test_means_of_reconstructions_are_those_of_the_clips():
    pairs = make_batch(0, 1, 2).pairs
    for metric, measure in ((Psnr(), psnr), (Ssim(), ssim)):
        values = [measure(pair.original.frames, pair.decoded.frames) for pair in pairs]
        state = metric.update(metric.init(), MetricBatch(pairs=pairs))
        estimate = metric.compute(state)[metric.name]
        assert (estimate.value, estimate.count) == (np.mean(values), 3)
        assert estimate.interval[0] < estimate.value < estimate.interval[1]
        assert metric.list_examples(state) == [{metric.name: value} for value in values]


def test_equal_clips_have_a_psnr_of_100_db():
    batch = make_batch(0, 1)
    same = [pair._replace(decoded=pair.original) for pair in batch.pairs]
    metric = Psnr()
    assert metric.measure(MetricBatch(pairs=same)) == [100.0, 100.0]
    assert LinearPsnr().measure(batch) == [100.0, 100.0]
    assert list(LinearPsnr().measure(MetricBatch(pairs=batch.pairs))) == []
    assert metric.describe()["psnr"].format_value(100.0) == "100.0 dB"


def test_values_are_written_with_their_units():
    share = MetricDescription(label="share", unit="%", decimals=1)
    assert share.format_value(1 / 3) == share.format_value(1 / 3, is_precise=True) == "33.3%"
    number = MetricDescription(label="distance", decimals=2)
    assert (number.format_value(1 / 3), number.format_value(1 / 3, is_precise=True)) == ("0.33", "0.333")
    estimate = MetricValue(value=0.5, interval=(0.25, 0.75), count=4)
    assert share.format_interval(estimate) == "25.0% to 75.0%"
    assert share.format_interval(MetricValue(value=0.5, count=1)) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_is_finite(value):
    with pytest.raises(UserError, match=r"is invalid: a metric is a finite number\. Use None"):
        MetricValue(value=value, count=1)


def test_an_evaluation_refuses_what_it_cannot_compute():
    with pytest.raises(UserError, match=r"two have a value 'psnr'\. Leave one out"):
        CaptionEvaluation(metrics=(Psnr(), Psnr()))
    with pytest.raises(UserError, match=r"metric SceneColumn is invalid: CaptionEvaluation has no scenes"):
        CaptionEvaluation(metrics=(SceneColumn(),))
    assert ShapesEvaluation(metrics=(SceneColumn(),)).metrics == (SceneColumn(),)

    class Misspelled(SceneColumn):
        needs = ("sample",)

    with pytest.raises(UserError, match="metric Misspelled is invalid: ShapesEvaluation has no sample"):
        ShapesEvaluation(metrics=(Misspelled(),))

    class Nothing(SceneColumn):
        needs = ("pipeline",)

    with pytest.raises(UserError, match="metric Nothing is invalid: its needs name no examples"):
        ShapesEvaluation(metrics=(Nothing(),))


def test_an_evaluation_is_written_with_its_metrics():
    config = CaptionEvaluation(trained=1, metrics=(Ssim(), LinearPsnr()))
    assert config_json.from_json(config_json.to_json(config)) == config
    written = config_json.to_json(config) | {"metrics": [config_json.to_json(CaptionEvaluation())]}
    with pytest.raises(UserError, match=r"metrics=.* of CaptionEvaluation is invalid"):
        config_json.from_json(written)
