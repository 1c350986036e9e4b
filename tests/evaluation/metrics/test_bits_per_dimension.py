"""Bits per dimension: normal latents, whose likelihood under the best model is known, and pipelines."""

import math

import jax
import numpy as np
import pytest
from scipy import stats

from dit_video.core.errors import UserError
from dit_video.diffusion import (
    X0,
    CosineBetas,
    Edm,
    Epsilon,
    Preconditioning,
    RectifiedFlow,
    V,
    VariancePreservingProcess,
    Velocity,
)
from dit_video.evaluation.metrics.likelihood import BitsPerDimension, LatentLikelihood
from support.clip_rows import MEAN, STD, draw_clips, make_best_denoise, make_clip_rows
from support.marks import mark_slow_except

CLIPS = draw_clips(6, 3, 5)
FUNCTION = LatentLikelihood(steps=32, probes=1, min_ratio=0.002)
TOLERANCE = 0.01
"""Error of 32 steps, in bits per dimension."""
OBJECTIVES = {
    "flow": (RectifiedFlow(), Velocity()),
    "shifted-flow-v": (RectifiedFlow(shift=5.0), V()),
    "flow-data": (RectifiedFlow(), X0()),
    "ddpm-noise": (VariancePreservingProcess(), Epsilon()),
    "ddpm-v": (VariancePreservingProcess(betas=CosineBetas(), zero_terminal_snr=True), V()),
    "edm": (Edm(), Preconditioning()),
}


def compute_bits(process, prediction, rows, seeds, *, function=FUNCTION, std=STD):
    clips = make_clip_rows(rows, process, prediction, seeds=seeds)
    denoise = make_best_denoise(process, prediction, std=std)
    return np.asarray(jax.jit(lambda: function(denoise, clips))())[0]


def compute_true_bits(clip, std=STD):
    return -stats.norm.logpdf(clip, MEAN, std).mean(axis=(0, 1)) / math.log(2)


@pytest.mark.nightly
@pytest.mark.parametrize("name", mark_slow_except(["shifted-flow-v", "ddpm-noise"], OBJECTIVES))
def test_bits_of_normal_latents_are_those_of_their_density(name):
    bits = compute_bits(*OBJECTIVES[name], [CLIPS[:2], CLIPS[2:]], [[1, 2], [3]])
    true = [compute_true_bits(clip) for clip in CLIPS]
    np.testing.assert_allclose([bits[0, 0], bits[0, 1], bits[1, 0]], true, atol=TOLERANCE)
    assert np.ptp(true) > 10 * TOLERANCE  # so that another clip's bits would fail


def test_a_model_of_another_scale_has_more_bits():
    """The negative control: the data are not its own."""
    process, prediction = OBJECTIVES["flow"]
    best, other = (
        compute_bits(process, prediction, [draw_clips(500)], [[1]], std=std)[0, 0] for std in (STD, 1.5 * STD)
    )
    # The divergence of normal distributions of standard deviations s and 1.5 s.
    expected = (math.log(1.5) + 1 / (2 * 1.5**2) - 0.5) / math.log(2)
    assert other - best == pytest.approx(expected, abs=0.03)


@pytest.mark.nightly
def test_more_steps_are_closer():
    errors = []
    for steps in (4, 8, 16):
        function = LatentLikelihood(steps=steps, probes=1, min_ratio=0.002)
        bits = compute_bits(*OBJECTIVES["flow"], [CLIPS[:1]], [[1]], function=function)
        errors.append(abs(bits[0, 0] - compute_true_bits(CLIPS[0])))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_latents_need_noise():
    process, prediction = OBJECTIVES["flow"]
    clips = make_clip_rows([CLIPS[:1]], process, prediction, seeds=[[1]], is_clean=np.zeros((1, 10), bool))
    with pytest.raises(UserError, match="without noise"):
        FUNCTION(make_best_denoise(process, prediction), clips)


def test_the_mean_over_clips_has_an_interval():
    metric = BitsPerDimension()
    value = metric.compute(metric.merge((1.0, 2.0), (3.0,)))["bits_per_dimension"]
    assert (value.value, value.count) == (2.0, 3)
    assert value.interval == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert metric.compute(())["bits_per_dimension"].value is None


@pytest.mark.parametrize("options", [{"steps": 0}, {"probes": 0}, {"min_ratio": 0.0}, {"min_ratio": 1.0}, {"seed": -1}])
def test_invalid_options_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        BitsPerDimension(**options)
