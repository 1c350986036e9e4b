"""A model with a state in sampling, compared with a loop over the model without one."""

import functools
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.core.errors import UserError
from dit_video.core.trees import flatten
from dit_video.diffusion import AdaptiveProjectedGuidance, Guidance, Heun
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.nn import get_graph_def
from dit_video.sampling import Monitor, Sampling, sample_latents
from dit_video.sampling.clip_functions import open_denoiser
from dit_video.sampling.plan import LatentUpdate, SamplingPlan
from dit_video.sampling.sampler import list_programs
from dit_video.tokens import PackedRows, compute_positions, patchify, unpatchify
from support.random_params import make_random_params
from support.recalling_model import RECALL, RecallingConfig
from support.tiny_denoiser import DENOISER, DIT, SHAPE, make_request

CONFIG = RecallingConfig(**vars(DIT))
MODEL = DENOISER._replace(backbone=get_graph_def(CONFIG.make))
TWO = MODEL._replace(params=MODEL.params | {"low_noise": make_random_params(DIT.make, seed=1)}, boundary=0.6)
LARGE, SMALL = make_request("red", (2, 4, 4), negative="blue"), make_request("dot", (1, 2, 4), seed=1, negative="blue")
"""A clip whose branches need rows of their own, and one whose branches lie side by side."""


def sample_requests(requests, sampling, denoiser=MODEL, **options):
    return sample_latents(denoiser, requests, sampling=sampling, shape=SHAPE, rows=2, **options)


@functools.partial(jax.jit, static_argnames="expert")
def predict(x, time, text, positions, expert="backbone"):
    """Return the velocity of one clip by the model without a state."""
    text_segments = jnp.ones((1, text.shape[0]), jnp.int32)
    context = nnx.merge(TWO.text, TWO.params["text"])(text[None], text_segments)
    layout = PackedRows(segments=jnp.ones((1, x.shape[0]), jnp.int32), positions=positions[None], count=1)
    conditioning = Conditioning(TextTokens(context.values, context.segments))
    model = nnx.merge(DENOISER.backbone, TWO.params[expert])
    return model(x[None], time.reshape(1, 1), layout, conditioning)[0][0]


def sample_by_hand(request, sampling, *, boundary=0.0, has_second=False):
    """Return latents of a loop that keeps the last prediction of each branch that a step evaluates."""
    grid = request.get_token_grid(DIT.patch)
    x, positions = patchify(request.noise, DIT.patch), compute_positions(grid)
    texts = [DENOISER.tokenizer(text) for text in (request.prompt, request.negative)]
    guidance, times = sampling.guidance, np.asarray(sampling.make_times(DENOISER.process).times)
    low, high = guidance.interval or (0.0, 1.0)
    last, expert = np.zeros((2, *x.shape), np.float32), "backbone"

    def evaluate(x, time, last, branch):
        return np.asarray(predict(x, jnp.asarray(time), texts[branch], positions, expert)) + RECALL * last[branch]

    def guide(x, time, last):
        """Return the velocity at a time, and each branch's last prediction."""
        last = last.copy()
        last[0] = evaluate(x, time, last, 0)
        scale = guidance.get_scale("text", int(expert == "low_noise"))
        if scale == 1 or not low <= time <= high:
            return last[0], last
        last[1] = evaluate(x, time, last, 1)
        return last[1] + scale * (last[0] - last[1]), last

    for time, following in itertools.pairwise(times):
        if time < boundary and expert == "backbone":
            last, expert = np.zeros_like(last), "low_noise"
        slope, next_last = guide(x, time, last)
        if has_second and following > 0:
            second, _ = guide(x + (following - time) * slope, following, last)
            slope = (slope + second) / 2
        x, last = x + (following - time) * slope, next_last
    return unpatchify(x, grid, DIT.patch)


@pytest.mark.parametrize("interval", [None, (0.3, 0.8)])
@pytest.mark.parametrize("together", [True, False])
def test_every_branch_has_its_state_in_rows_of_their_own_and_side_by_side(interval, together):
    """Outside of the interval the unconditional branch waits, whichever other requests are sampled."""
    guidance = Guidance(scales={"text": 3.0}, interval=interval)
    sampling = Sampling(steps=5, guidance=guidance, branch_evaluation="together" if together else "apart")
    requests = [LARGE, SMALL, SMALL._replace(prompt="box"), make_request("a", (1, 4, 4), seed=2)]
    results = sample_requests(requests, sampling)
    for request, result in zip(requests, results, strict=True):
        np.testing.assert_allclose(result, sample_by_hand(request, sampling), atol=1e-4)
    without = sample_requests(requests, sampling, DENOISER)
    assert all(np.abs(result - other).max() > 0.05 for result, other in zip(results, without, strict=True))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_state_is_that_after_the_first_evaluation_of_a_step(scale):
    sampling = Sampling(steps=4, guidance=scale, solver=Heun())
    for request in (LARGE, SMALL):
        (result,) = sample_requests([request], sampling)
        np.testing.assert_allclose(result, sample_by_hand(request, sampling, has_second=True), atol=1e-4)


def test_the_state_goes_from_block_to_block_beside_momentum():
    projection = AdaptiveProjectedGuidance(momentum=-0.5)
    for guidance in (1.0, 3.0, Guidance(scales={"text": 3.0}, method=projection, interval=(0.3, 0.8))):
        sampling = Sampling(steps=5, guidance=guidance)
        watch = Monitor(lambda progress: None, block_steps=2)
        for request in (LARGE, SMALL):
            blocks, whole = (sample_requests([request], sampling, monitor=each)[0] for each in (watch, None))
            np.testing.assert_array_equal(blocks, whole)


@pytest.mark.parametrize("guidance", [(3.0, 3.0), (3.0, 1.0), (1.0, 3.0)])
def test_each_expert_begins_with_a_state_of_its_own(guidance):
    sampling = Sampling(steps=5, guidance=guidance)
    times = np.asarray(sampling.make_times(TWO.process).times)
    assert times[1] > TWO.boundary > times[-2]
    for request in (LARGE, SMALL):
        (result,) = sample_requests([request], sampling, TWO)
        expected = sample_by_hand(request, sampling, boundary=TWO.boundary)
        np.testing.assert_allclose(result, expected, atol=1e-4)


class Unchanged(LatentUpdate):
    """An update that leaves the latents as they are; such blocks have one step here."""

    def __call__(self, latents, end):
        return latents


@pytest.mark.parametrize("resample", [1, 2])
def test_the_state_begins_again_where_latents_may_have_changed(resample):
    """The model then is the one without a state in every step."""
    plan = SamplingPlan(update=Unchanged(), resample=resample)
    for denoiser in (MODEL, TWO):
        plain = denoiser._replace(backbone=DENOISER.backbone)
        for request in (LARGE, SMALL):
            requests = [request._replace(plan=plan)]
            sampling = Sampling(steps=5, guidance=3.0)
            results = [sample_requests(requests, sampling, each)[0] for each in (denoiser, plain)]
            np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("denoiser", [MODEL, TWO], ids=["one", "two experts"])
def test_an_opened_denoiser_begins_and_returns_the_state(denoiser):
    sampling = Sampling(steps=5, guidance=1.0)
    requests = [each._replace(plan=SamplingPlan(start=each.noise)) for each in (LARGE, SMALL)]
    opened = open_denoiser(denoiser, requests, sampling=sampling, shape=SHAPE, rows=2)
    x, state = jnp.asarray(opened.clips.data), opened.init_state()
    times = np.asarray(sampling.make_times(denoiser.process).times)
    denoise = jax.jit(lambda *arguments: opened.denoise(denoiser.params, *arguments))
    for time, following in itertools.pairwise(times):
        slope, state = denoise(x, time, state)
        x = x + (following - time) * slope
    calls = [int(each["calls"][0]) for each in (state if isinstance(state, tuple) else (state,))]
    assert sum(calls) == 5
    assert min(calls) > 0
    for request, row, slot in zip(requests, opened.rows, opened.slots, strict=True):
        tokens = x[row][np.asarray(opened.clips.rows.segments[row]) == slot + 1]
        expected = sample_by_hand(request, sampling, boundary=denoiser.boundary or 0.0)
        np.testing.assert_allclose(
            unpatchify(np.asarray(tokens), request.get_token_grid(DIT.patch), DIT.patch), expected, atol=1e-4
        )
    plain = open_denoiser(DENOISER, requests, sampling=sampling, shape=SHAPE, rows=2)
    assert plain.init_state() is None


@pytest.mark.parametrize("together", [True, False])
def test_a_listed_program_has_the_state_of_the_one_that_is_run(together):
    sampling = Sampling(steps=3, guidance=(3.0, 1.0), branch_evaluation="together" if together else "apart")
    shapes = TWO._replace(params=jax.eval_shape(lambda: TWO.params))
    for request in (LARGE, SMALL):
        listed = list(list_programs(shapes, [request], sampling=sampling, shape=SHAPE, rows=2))
        assert [name for name, *_ in listed] == ["backbone", "low_noise"]
        for _, program, arguments in listed:
            state = jax.eval_shape(program, *arguments)
            assert jax.tree.map(get_type, state) == jax.tree.map(get_type, arguments.state)
            assert any("last" in path for path in flatten(state))


def get_type(leaf):
    return leaf.shape, leaf.dtype


def test_a_state_without_an_axis_of_the_rows_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class ScalarConfig(RecallingConfig):
        def init_sampling_state(self, rows):
            return jnp.zeros(())

    denoiser = MODEL._replace(backbone=get_graph_def(ScalarConfig(**vars(DIT)).make))
    with pytest.raises(UserError, match=r"of ScalarConfig is invalid: an array has the shape \(\), .* the 2 rows. Use"):
        sample_requests([SMALL], Sampling(steps=2), denoiser)
