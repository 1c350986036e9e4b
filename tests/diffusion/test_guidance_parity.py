"""Projected and rescaled guidance, CFG-Zero* and skip-layer guidance equal diffusers'."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.diffusion import (
    X0,
    AdaptiveProjectedGuidance,
    Guidance,
    GuidanceState,
    RectifiedFlow,
    SkipLayerGuidance,
    UniformTimes,
    Velocity,
    ZeroStarGuidance,
    apply_guidance,
    sequential,
    stateless,
)

pytestmark = pytest.mark.parity

NOISY, COND, UNCOND = np.random.default_rng(0).normal(size=(3, 2, 4, 6, 6)).astype(np.float32)
TIME = jnp.asarray(0.6)


def ours(guidance):
    branches = sequential(stateless(lambda *_: jnp.asarray(COND)), stateless(lambda *_: jnp.asarray(UNCOND)))
    denoise = apply_guidance(branches, guidance.get_params(TIMES), process=RectifiedFlow(), prediction=X0())
    return denoise(jnp.asarray(NOISY), TIME, None)[0]


@pytest.mark.parametrize(("parallel", "largest"), [(0.0, None), (0.3, None), (1.0, 0.5), (0.0, 5.0), (0.4, 0.05)])
def test_projected_guidance_equals_diffusers(parallel, largest):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    threshold = 0.0 if largest is None else largest * np.sqrt(NOISY[0].size)
    expected = module.normalized_guidance(
        torch.from_numpy(COND),
        torch.from_numpy(UNCOND),
        5.0 - 1.0,
        eta=parallel,
        norm_threshold=threshold,
        use_original_formulation=True,
    )
    result = ours(
        Guidance(scales={"text": 5.0}, method=AdaptiveProjectedGuidance(parallel_weight=parallel, max_rms=largest))
    )
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [-0.5, 0.8])
def test_projected_guidance_with_momentum_equals_diffusers(momentum):
    """There are four steps with different predictions."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    buffer, state = module.MomentumBuffer(momentum), GuidanceState(method=jnp.zeros(NOISY.shape))
    strength = Guidance(
        scales={"text": 5.0}, method=AdaptiveProjectedGuidance(parallel_weight=0.3, max_rms=1.5, momentum=momentum)
    ).get_params(TIMES)
    for c, u in np.random.default_rng(1).normal(size=(4, 2, *NOISY.shape)).astype(np.float32):
        threshold = 1.5 * np.sqrt(NOISY[0].size)
        expected = module.normalized_guidance(
            torch.from_numpy(c), torch.from_numpy(u), 4.0, buffer, 0.3, threshold, use_original_formulation=True
        )
        branches = sequential(stateless(lambda *_, c=c: jnp.asarray(c)), stateless(lambda *_, u=u: jnp.asarray(u)))
        denoise = apply_guidance(branches, strength, process=RectifiedFlow(), prediction=X0())
        result, state = denoise(jnp.asarray(NOISY), TIME, state)
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(state.method, buffer.running_average.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_equals_diffusers(rescale):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.guiders.guider_utils")
    cond, uncond = torch.from_numpy(COND), torch.from_numpy(UNCOND)
    expected = module.rescale_noise_cfg(uncond + 6.0 * (cond - uncond), cond, rescale)
    np.testing.assert_allclose(
        ours(Guidance(scales={"text": 6.0}, rescale=rescale)), expected.numpy(), rtol=1e-4, atol=1e-4
    )


SKIPPED = np.random.default_rng(2).normal(size=COND.shape).astype(np.float32)
STEPS = 20
TIMES = np.asarray(UniformTimes()(RectifiedFlow(shift=3.0), STEPS).times)


def guide_velocity(guidance, step):
    """Return the guided velocity of arrays at the beginning of a step."""
    if (params := guidance.get_params(TIMES)) is None:
        return COND
    branches = [stateless(lambda *_, value=value: jnp.asarray(value)) for value in (COND, UNCOND)]
    denoise = apply_guidance(
        sequential(*branches[: guidance.branch_count]),
        params,
        skipped=stateless(lambda *_: jnp.asarray(SKIPPED)),
        prediction=Velocity(),
    )
    return denoise(jnp.asarray(NOISY), jnp.asarray(TIMES[step]), None)[0]


def theirs_at(guider, step, *predictions):
    torch = pytest.importorskip("torch")
    guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.zeros(()))
    return guider.forward(*(torch.from_numpy(each) for each in predictions)).pred.numpy()


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_cfg_zero_star_equals_diffusers(rescale):
    module = pytest.importorskip("diffusers.guiders")
    guider = module.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=2, guidance_rescale=rescale)
    guidance = Guidance(scales={"text": 5.0}, rescale=rescale, method=ZeroStarGuidance(zero_steps=2))
    for step in (0, 1, 2, 7):
        result = guide_velocity(guidance, step)
        if step < 2:  # diffusers' rescaling of zeros is NaN
            np.testing.assert_array_equal(result, 0)
        else:
            np.testing.assert_allclose(result, theirs_at(guider, step, COND, UNCOND), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_skip_layer_guidance_equals_diffusers_at_every_step(scale, rescale):
    """The original formulation adds both steps to the conditional prediction, also at scale 1."""
    module = pytest.importorskip("diffusers.guiders")
    skip = SkipLayerGuidance(layers=(1,), scale=2.8, start=0.11, stop=0.5)
    guider = module.SkipLayerGuidance(
        guidance_scale=scale - 1,
        skip_layer_guidance_scale=2.8,
        skip_layer_guidance_start=0.11,
        skip_layer_guidance_stop=0.5,
        skip_layer_guidance_layers=[1],
        guidance_rescale=rescale,
        use_original_formulation=True,
    )
    changed = 0
    for step in range(STEPS):
        result = guide_velocity(Guidance(scales={"text": scale}, rescale=rescale, skip_layers=skip), step)
        np.testing.assert_allclose(
            result, theirs_at(guider, step, COND, UNCOND, SKIPPED), rtol=1e-4, atol=1e-4, err_msg=str(step)
        )
        without = guide_velocity(Guidance(scales={"text": scale}, rescale=rescale, skip_layers=None), step)
        changed += bool(np.abs(result - without).max() > 1e-3)
    assert changed == 7  # steps 3 to 9
