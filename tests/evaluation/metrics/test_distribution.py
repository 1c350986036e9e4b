"""Distances of sets of features as metrics: Fréchet and kernel distances, precision and recall, inception score."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.evaluation.feature_functions import OpenFeatures
from dit_video.evaluation.metrics import distributions
from dit_video.evaluation.metrics.distributions import (
    FrechetMetric,
    InceptionScore,
    KernelMetric,
    Memorisation,
    PrecisionRecall,
)
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.video import Clip
from support.colour_features import ColourFeatures, FrameColours, draw_clips

FEATURES = ColourFeatures()
FRECHET = FrechetMetric(features=FEATURES, name="colours", label="colour distance")
METRICS = (
    FRECHET,
    KernelMetric(features=FEATURES),
    PrecisionRecall(features=FEATURES),
    Memorisation(features=FEATURES),
)


def measure(metric, samples, real_clips, *, batch=50):
    state = metric.init()
    for field, clips in (("samples", samples), ("real_clips", real_clips)):
        for start in range(0, len(clips), batch):
            state = metric.update(state, MetricBatch(**{field: clips[start : start + batch]}))
    return metric.compute(state)


REAL = draw_clips(200, seed=0)


def test_a_set_has_no_distance_from_itself():
    assert measure(FRECHET, REAL, REAL)["colours"].value == pytest.approx(0, abs=1e-6)
    assert measure(METRICS[1], REAL, REAL)["kid"].value == pytest.approx(0, abs=0.01)
    overlap = measure(METRICS[2], REAL, REAL)
    assert (overlap["precision"].value, overlap["recall"].value) == (1, 1)


def test_distances_grow_with_a_shift_and_their_intervals_contain_those_of_other_draws():
    near, far = (measure(FRECHET, draw_clips(200, seed=1, shift=shift), REAL)["colours"] for shift in (0, 30))
    assert far.value > 3 * near.value
    assert far.interval[0] > near.interval[1]
    again = measure(FRECHET, draw_clips(200, seed=2, shift=30), REAL)["colours"]
    assert far.interval[0] < again.value < far.interval[1]
    kernel = [measure(METRICS[1], draw_clips(200, seed=1, shift=shift), REAL)["kid"] for shift in (0, 30, 60)]
    assert kernel[0].value < kernel[1].value < kernel[2].value
    assert kernel[0].interval[0] < 0 < kernel[0].interval[1]
    assert kernel[1].interval[0] > 0
    overlap = measure(METRICS[2], draw_clips(200, seed=1, shift=100), REAL)
    assert overlap["precision"].value < 0.2


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_merged_states_give_the_values_of_one(metric):
    samples = draw_clips(150, seed=3, shift=10)
    whole = measure(metric, samples, REAL)
    first, second = metric.init(), metric.init()
    first = metric.update(first, MetricBatch(samples=samples[:64]))
    first = metric.update(first, MetricBatch(real_clips=REAL[:32]))
    second = metric.update(second, MetricBatch(samples=samples[64:]))
    second = metric.update(second, MetricBatch(real_clips=REAL[32:]))
    merged = metric.compute(metric.merge(first, second))
    assert {name: each.value for name, each in merged.items()} == pytest.approx(
        {name: each.value for name, each in whole.items()}, rel=1e-6, abs=1e-9
    )


@pytest.mark.nightly
def test_fewer_clips_than_features_are_said_in_the_figure(monkeypatch):
    wide = OpenFeatures(
        lambda clips: np.random.default_rng(len(clips)).normal(size=(len(clips), 100)).astype("f4"), "w"
    )
    monkeypatch.setattr(ColourFeatures, "open", lambda self: wide)
    value = measure(FRECHET, REAL[:80], REAL[80:160])["colours"]
    assert "only 80 examples for 100 features" in value.note
    assert value.value is not None


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: type(metric).__name__)
def test_too_few_clips_have_no_value(metric):
    values = measure(metric, REAL[:3], REAL[:3])
    assert {each.value for each in values.values()} == {None}
    assert {each.value for each in measure(metric, REAL[:3], []).values()} == {None}


def test_copies_are_memorised_and_new_samples_are_not():
    metric = Memorisation(features=FEATURES)
    new = measure(metric, draw_clips(200, seed=5), REAL)["memorised"]
    assert new.value < 0.15
    assert new.interval[0] < 0.05 < new.interval[1] + 0.05
    copies = [REAL[number] for number in (7, 3, 150)]
    assert measure(metric, copies, REAL)["memorised"].value == 1
    state = metric.update(metric.init(), MetricBatch(real_clips=REAL))
    state = metric.update(state, MetricBatch(samples=[*copies, *draw_clips(2, seed=5)]))
    assert metric.list_nearest(state)[:3] == [7, 3, 150]
    assert [row["memorised"] for row in metric.list_examples(state)] == [True] * 3 + [False] * 2


def repeat_frames(clips, count):
    """Return clips of `count` copies of the first frame of each."""
    return [Clip(np.repeat(clip.frames[:1], count, axis=0), fps=8) for clip in clips]


@pytest.mark.parametrize(
    "make",
    [
        lambda features: FrechetMetric(features=features, name="distance", label="distance"),
        lambda features: KernelMetric(features=features, subsets=25, subset_size=400),
        lambda features: PrecisionRecall(features=features),
        lambda features: Memorisation(features=features),
        lambda features: InceptionScore(logits=features),
    ],
    ids=["frechet", "kernel", "overlap", "memorisation", "inception score"],
)
def test_clips_of_equal_frames_have_the_value_and_interval_of_one_frame(make):
    metric, samples = make(FrameColours()), draw_clips(192, seed=6, shift=10)
    real_clips = REAL if "real_clips" in metric.needs else []
    one, many = (measure(metric, repeat_frames(samples, count), repeat_frames(real_clips, count)) for count in (1, 4))
    for name, estimate in one.items():
        assert many[name].value == pytest.approx(estimate.value, rel=0.02, abs=1e-5), name
        assert many[name].count == estimate.count
        if estimate.interval is not None:
            assert np.ptp(many[name].interval, axis=0) == pytest.approx(np.ptp(estimate.interval, axis=0), rel=0.05), (
                name
            )
    assert any(each.interval is not None for each in one.values())


def test_functions_of_frames_compare_clips_for_memorisation():
    metric = Memorisation(features=FrameColours())
    clips = draw_clips(60, seed=8)
    state = metric.update(metric.init(), MetricBatch(real_clips=clips))
    state = metric.update(state, MetricBatch(samples=[clips[9], *draw_clips(3, seed=9, shift=80), clips[4]]))
    assert [metric.list_nearest(state)[index] for index in (0, 4)] == [9, 4]
    assert [row["memorised"] for row in metric.list_examples(state)] == [True, False, False, False, True]
    assert metric.compute(state)["memorised"].count == 5


def test_the_sets_are_compared_once_for_all_that_is_listed(monkeypatch):
    calls = []
    find = distributions.find_nearest
    monkeypatch.setattr(distributions, "find_nearest", lambda *args: calls.append(1) or find(*args))
    metric = METRICS[3]
    state = metric.update(metric.init(), MetricBatch(real_clips=REAL, samples=REAL[:5]))
    assert (
        len(metric.list_nearest(state)) == len(metric.list_examples(state)) == metric.compute(state)["memorised"].count
    )
    assert len(calls) == 1
    more = metric.update(state, MetricBatch(samples=REAL[5:7]))
    assert len(metric.list_nearest(more)) == 7


def test_a_function_that_does_not_say_whether_rows_are_of_frames_is_refused(monkeypatch):
    opened = FrameColours().open()
    monkeypatch.setattr(FrameColours, "open", lambda self: opened._replace(is_of_frames=False))
    metric = FrechetMetric(features=FrameColours(), name="n", label="n")
    with pytest.raises(UserError, match=r"15 rows for 5 clips.*is_of_frames=True"):
        metric.update(metric.init(), MetricBatch(samples=REAL[:5]))


def test_features_that_are_not_finite_are_refused():
    damaged = ColourFeatures(gain=float("nan"))
    for metric in (FrechetMetric(features=damaged, name="n", label="n"), PrecisionRecall(features=damaged)):
        with pytest.raises(UserError, match="5 of 5 clips are not finite"):
            metric.update(metric.init(), MetricBatch(samples=REAL[:5]))


def test_the_inception_score_is_the_number_of_classes_of_certain_samples(monkeypatch):
    def extract(clips):
        classes = np.arange(len(clips)) % 4
        return 50 * np.eye(4, dtype=np.float32)[classes]

    monkeypatch.setattr(ColourFeatures, "open", lambda self: OpenFeatures(extract, "four classes"))
    metric = InceptionScore(logits=FEATURES, splits=5)
    score = measure(metric, REAL[:40], [])["inception_score"]
    assert score.value == pytest.approx(4, abs=1e-3)
    monkeypatch.setattr(ColourFeatures, "open", lambda self: OpenFeatures(lambda x: 0 * extract(x), "uncertain"))
    assert measure(metric, REAL[:40], [])["inception_score"].value == pytest.approx(1, abs=1e-6)
