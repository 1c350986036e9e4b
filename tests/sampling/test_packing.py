"""Branches of guidance, evaluated at once or one after the other, in one row or in several."""

from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    AdaptiveProjectedGuidance,
    Ddim,
    ExponentialShift,
    Guidance,
    RectifiedFlow,
    SkipLayerGuidance,
    ThresholdedPrediction,
    Velocity,
    ZeroStarGuidance,
)
from dit_video.distributed import Parallelism
from dit_video.distributed.mesh import make_abstract_mesh
from dit_video.nn import get_graph_def
from dit_video.sampling import (
    Sampling,
    SamplingPlan,
    SamplingRequest,
    draw_initial_noise,
    sample_latents,
    trace_latents,
)
from dit_video.sampling.packing import RequestSize, RowMultiples, compute_row_multiples, plan_rows
from dit_video.tokens import Field, Grid, PackedShape
from support.random_params import make_random_params
from support.tiny_denoiser import DENOISER, DIT, SHAPE, SMALL, make_request

TWO = [SMALL, make_request("a box", (1, 4, 6), seed=2, negative="red")]
"""Requests of 2 and 6 tokens: both branches of each fill a row of 16."""
EVERYTHING = Guidance(
    scales={"text": 4.0},
    interval=(0.3, 1.0),
    rescale=0.6,
    method=AdaptiveProjectedGuidance(parallel_weight=0.2, max_rms=0.5, momentum=-0.5),
)


def sample_requests(requests, sampling, *, denoiser=DENOISER, rows=1, shape=SHAPE):
    return sample_latents(denoiser, requests, sampling=sampling, shape=shape, rows=rows)


@pytest.mark.nightly
def test_branches_give_the_same_result_in_any_row_or_order():
    """They may share a row, have a row each, or be evaluated one after the other."""
    sampling = Sampling(steps=3, guidance=EVERYTHING)
    inside = sample_requests(TWO, sampling)
    below = sample_requests(TWO, sampling, shape=replace(SHAPE, segments=1))
    apart = sample_requests(TWO, replace(sampling, branch_evaluation="apart"), shape=replace(SHAPE, segments=1))
    for one, two, three in zip(inside, below, apart, strict=True):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, three, atol=5e-5)
        np.testing.assert_allclose(two, three, atol=5e-5)


@pytest.mark.nightly
def test_statistics_of_guidance_are_of_each_clip_alone():
    both = sample_requests(TWO, Sampling(steps=3, guidance=EVERYTHING))
    louder = TWO[1]._replace(noise=20 * TWO[1].noise)
    neighbours = sample_requests([SMALL, louder], Sampling(steps=3, guidance=EVERYTHING))
    np.testing.assert_allclose(neighbours[0], both[0], atol=5e-5)
    assert np.abs(both[0] - sample_requests([SMALL], Sampling(steps=3, guidance=4.0))[0]).max() > 1e-3


@pytest.mark.nightly
def test_a_threshold_is_of_each_clip_alone():
    prediction = ThresholdedPrediction(prediction=Velocity(), quantile=0.9, max_threshold=100.0)
    denoiser, sampling = DENOISER._replace(prediction=prediction), Sampling(steps=2, guidance=4.0)
    both = sample_requests(TWO, sampling, denoiser=denoiser)
    louder = TWO[1]._replace(noise=20 * TWO[1].noise)
    np.testing.assert_allclose(sample_requests([SMALL, louder], sampling, denoiser=denoiser)[0], both[0], atol=5e-5)
    assert np.abs(both[0]).max() <= 1 + 1e-5
    assert np.abs(sample_requests(TWO, sampling)[0]).max() > 1.1


NOISY = Sampling(steps=3, guidance=2.0, solver=Ddim(eta=1.0))


@pytest.mark.slow
def test_noise_between_steps_depends_on_the_seed_alone():
    first, second = (request._replace(seed=seed) for seed, request in enumerate(TWO))
    both = sample_requests([first, second], NOISY)
    np.testing.assert_allclose(sample_requests([second, first], NOISY)[1], both[0], atol=5e-5)
    apart = sample_requests([second], replace(NOISY, branch_evaluation="apart"), shape=replace(SHAPE, segments=1))
    np.testing.assert_allclose(apart[0], both[1], atol=5e-5)
    again = sample_requests([first, second._replace(seed=7)], NOISY)
    np.testing.assert_allclose(again[0], both[0], atol=5e-5)
    assert np.abs(again[1] - both[1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("interval", [None, pytest.param((0.3, 1.0), marks=pytest.mark.slow)])
def test_samples_are_led_away_from_the_model_without_layers_however_branches_are_evaluated(interval):
    skip = SkipLayerGuidance(layers=(0,), scale=1.5, start=0.0, stop=0.9)
    guidance = Guidance(scales={"text": 4.0}, interval=interval, method=ZeroStarGuidance(), skip_layers=skip)
    sampling = Sampling(steps=4, guidance=guidance)
    together = sample_requests(TWO, sampling)
    apart = sample_requests(TWO, replace(sampling, branch_evaluation="apart"))
    for one, two in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, two, atol=5e-5)
    # The first step changes nothing, and the second and third are led away; the scale makes a difference too.
    for other in (replace(guidance, skip_layers=replace(skip, scale=0.0)), replace(guidance, scales={"text": 1.0})):
        changed = sample_requests(TWO, replace(sampling, guidance=other))
        assert np.abs(changed[0] - together[0]).max() > 1e-3


@pytest.mark.nightly
def test_the_trace_ends_at_the_sample():
    sampling = Sampling(steps=3, guidance=2.0)
    plain = sample_requests(TWO, sampling)
    for trace, latents in zip(trace_latents(DENOISER, TWO, sampling=sampling, shape=SHAPE, rows=1), plain, strict=True):
        assert trace.times.shape == (4,)
        assert trace.latents.shape == trace.data.shape == (3, *latents.shape)
        np.testing.assert_allclose(trace.latents[-1], latents, atol=5e-5)
        # The last step goes to the predicted data.
        np.testing.assert_allclose(trace.data[-1], latents, atol=5e-5)
        assert np.abs(trace.data[0] - latents).max() > 1e-2


def test_every_clip_is_sampled_at_the_times_of_its_size():
    process = RectifiedFlow(size_shift=ExponentialShift(tokens=(2, 6)))
    sized = DENOISER._replace(process=process)
    traces = trace_latents(sized, TWO, sampling=NOISY, shape=SHAPE, rows=2)
    assert np.abs(traces[0].times - traces[1].times).max() > 1e-3
    alone = trace_latents(sized, TWO[1:], sampling=NOISY, shape=SHAPE, rows=2)[0]
    np.testing.assert_array_equal(alone.times, traces[1].times)
    np.testing.assert_allclose(alone.latents, traces[1].latents, atol=5e-5)


def test_diverged_weights_are_reported_with_the_step():
    head = DENOISER.params["backbone"]["head"]
    spoiled = DENOISER.params["backbone"] | {"head": head | {"bias": np.full_like(head["bias"], np.nan)}}
    with pytest.raises(UserError, match="step 1 of 3, at time 1, gave NaN or infinity: the weights have diverged"):
        sample_requests(
            TWO, Sampling(steps=3), denoiser=DENOISER._replace(params=DENOISER.params | {"backbone": spoiled})
        )


CONDITIONED = replace(DIT, cond_channels=3)


def make_conditioned(**experts):
    """Return a denoiser with random weights, whose rows have conditioning latents."""
    params = {name: make_random_params(CONDITIONED.make, seed) for name, seed in (experts or {"backbone": 0}).items()}
    return DENOISER._replace(
        backbone=get_graph_def(CONDITIONED.make),
        params=params | {"text": DENOISER.params["text"]},
        boundary=0.5 if experts else None,
    )


LATENTS = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
KNOWN = Field(name="cond_latents", alignment="grid", shape=(3,))
IMAGED = SamplingRequest("red", "", draw_initial_noise(0, Grid(2, 4, 4), 2), SamplingPlan({KNOWN: LATENTS}))


@pytest.mark.slow
def test_the_image_has_its_own_guidance_scale():
    denoiser, request = make_conditioned(), IMAGED
    blind = request._replace(plan=SamplingPlan({KNOWN: np.zeros_like(LATENTS)}))

    def one_step(request, guidance):
        return sample_requests([request], Sampling(steps=1, guidance=guidance), denoiser=denoiser)[0]

    text, image = 3.0, 2.5
    c, u = one_step(request, 1.0), one_step(request._replace(prompt=""), 1.0)
    b = one_step(blind._replace(prompt=""), 1.0)
    result = one_step(request, Guidance(scales={"text": text, "image": image}))
    np.testing.assert_allclose(result, b + image * (u - b) + text * (c - u), atol=2e-4)
    assert np.abs(result - one_step(request, text)).max() > 1e-2
    with pytest.raises(UserError, match="guidance of image is invalid: the model has no such condition"):
        sample_requests([SMALL], Sampling(guidance=Guidance(scales={"text": 2.0, "image": 2.0})))


@pytest.mark.slow
def test_an_expert_without_a_scale_of_the_image_has_the_same_result_in_rows_with_all_branches():
    denoiser, guidance = make_conditioned(backbone=0, low_noise=1), {"text": (3.0, 2.0), "image": (2.0, 1.0)}
    sampling = Sampling(steps=4, guidance=Guidance(scales=guidance))
    large = replace(SHAPE, tokens=3 * SHAPE.tokens, text=3 * SHAPE.text, segments=3)
    inside = sample_requests([IMAGED], sampling, denoiser=denoiser, shape=large)
    apart = sample_requests([IMAGED], replace(sampling, branch_evaluation="apart"), denoiser=denoiser)
    np.testing.assert_allclose(inside[0], apart[0], atol=5e-5)
    other = replace(sampling, guidance=Guidance(scales=guidance | {"image": 2.0}))
    assert np.abs(sample_requests([IMAGED], other, denoiser=denoiser)[0] - apart[0]).max() > 1e-3


def test_each_branch_of_guidance_lacks_one_condition_more():
    """Known frames are dropped with their image tokens; a start of sampling and masks of a task are no conditions."""
    grid = Grid(1, 2, 2)
    fields = {
        name: Field(name=name, alignment="grid", shape=(3,))
        for name in ("cond_latents", "image_tokens", "motion", "clean_mask")
    }
    plan = SamplingPlan({field: np.ones(field.get_shape(grid), np.float32) for field in fields.values()})
    request = SamplingRequest("red", "blue", np.zeros((*grid, 2), np.float32), plan._replace(start=np.ones((*grid, 2))))
    branches = [
        (prompt, {field.name for field, values in own.items() if not values.any()})
        for prompt, own in request.branches(("motion", "text", "image"))
    ]
    image = {"motion", "cond_latents", "image_tokens"}
    assert branches == [("red", set()), ("red", {"motion"}), ("blue", {"motion"}), ("blue", image)]


def test_two_scales_are_for_two_experts():
    with pytest.raises(UserError, match=r"guidance={'text': \(2\.0, 3\.0\)} is invalid: .* Use one number"):
        sample_requests([SMALL], Sampling(guidance=Guidance(scales={"text": (2.0, 3.0)})))


ROW = PackedShape(tokens=120, text=224, segments=12)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([30], [(True, 1)]),
        ([60], [(True, 1)]),
        ([61], [(False, 1)]),
        ([40] * 3, [(False, 1)]),  # bundles of 80 would waste a third of three rows
        ([30] * 4, [(True, 2)]),
        ([20] * 6 + [100], [(True, 2), (False, 1)]),
        ([130, 130, 10], [(True, 1), (False, 2)]),
    ],
)
def test_branches_are_packed_where_they_take_fewer_rows(tokens, expected):
    groups = plan_rows([RequestSize(Grid(1, 1, count), (10, 4)) for count in tokens], ROW, rows=1, is_batched=True)
    assert [(group.is_side_by_side, len(group.rows)) for group in groups] == expected
    assert sorted(index for group in groups for row in group.rows for index in row) == list(range(len(tokens)))


def test_branches_side_by_side_have_room_for_their_texts():
    long = [RequestSize(Grid(1, 1, 10), (150, 100))]
    assert not plan_rows(long, ROW, rows=1, is_batched=True)[0].is_side_by_side
    assert plan_rows([RequestSize(Grid(1, 1, 10), (150, 60))], ROW, rows=1, is_batched=True)[0].is_side_by_side
    assert not plan_rows([RequestSize(Grid(1, 1, 10), (20,))], ROW, rows=1, is_batched=True)[0].is_side_by_side


@pytest.mark.parametrize(
    ("sizes", "guidance", "multiples"),
    [
        ({"data": 2, "context": 4}, Guidance(scales={"text": 2.0}), RowMultiples(1, 2)),
        ({"data": 8}, Guidance(scales={"text": 2.0}), RowMultiples(4, 8)),
        ({"data": 2, "fsdp": 4}, Guidance(scales={"text": 2.0, "image": 3.0}), RowMultiples(8, 8)),
        ({"data": 8}, Guidance(scales={"text": 2.0}, interval=(0.2, 0.8)), RowMultiples(8, 8)),
        ({"data": 8}, Guidance(scales={"text": 1.0}), RowMultiples(8, 8)),
        ({"data": 8}, Guidance(scales={"text": (2.0, 1.0)}), RowMultiples(8, 8)),
        ({"data": 8}, Guidance(scales={"motion": 2.0, "text": 1.0}), RowMultiples(4, 8)),
        ({"data": 1, "context": 8}, Guidance(scales={"text": 2.0}), RowMultiples(1, 1)),
    ],
)
def test_rows_are_as_many_as_devices_share_all_that_is_evaluated(sizes, guidance, multiples):
    mesh = make_abstract_mesh(Parallelism(**sizes), 8)
    assert compute_row_multiples(mesh, guidance, is_batched=True) == multiples
    assert compute_row_multiples(None, guidance, is_batched=True) == RowMultiples(1, 1)
    assert compute_row_multiples(mesh, guidance, is_batched=False).separate == sizes["data"] * sizes.get("fsdp", 1)
