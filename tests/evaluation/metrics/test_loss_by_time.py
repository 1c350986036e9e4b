"""The loss at fixed times: a computation by hand, and the best model of normal latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.diffusion import Epsilon, RectifiedFlow, VariancePreservingProcess, Velocity, stateless
from dit_video.evaluation.metrics.likelihood import DenoisingLoss, LossByTime
from support.clip_rows import STD, draw_clips, make_best_denoise, make_clip_rows

FLOW, DDPM = (RectifiedFlow(), Velocity()), (VariancePreservingProcess(), Epsilon())
CLIPS = draw_clips(6, 3, 5)
FUNCTION = DenoisingLoss(times=(0.25, 0.75))


def compute_losses(denoise, clips, function=FUNCTION):
    return np.asarray(jax.jit(lambda: function(denoise, clips))())


def test_losses_equal_those_by_hand():
    clips = make_clip_rows([CLIPS[:2], CLIPS[2:]], *FLOW, seeds=[[1, 2], [3]])
    losses = compute_losses(stateless(lambda noisy, time: 0.5 * noisy + time), clips)
    for number, time in enumerate(FUNCTION.times):
        noise = np.asarray(clips.draw_noise("loss by time", number))
        data, segments = np.asarray(clips.data), np.asarray(clips.rows.segments)
        error = 0.5 * ((1 - time) * data + time * noise) + time - (noise - data)
        for row, segment in ((0, 1), (0, 2), (1, 1)):
            expected = np.square(error[row][segments[row] == segment]).mean()
            assert losses[number, row, segment - 1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize(("process", "prediction"), [FLOW, DDPM], ids=["flow", "ddpm"])
def test_the_best_model_has_the_variance_that_the_noisy_latents_leave(process, prediction):
    clips = make_clip_rows([draw_clips(4000)], process, prediction, seeds=[[1]])
    losses = compute_losses(make_best_denoise(process, prediction), clips)[:, 0, 0]
    worse = compute_losses(make_best_denoise(process, prediction, std=2 * STD), clips)[:, 0, 0]
    for time, loss, other in zip(FUNCTION.times, losses, worse, strict=True):
        alpha, sigma = (np.asarray(each(jnp.asarray(time))) for each in (process.alpha, process.sigma))
        left = STD**2 / ((alpha * STD) ** 2 + sigma**2)  # of the data, over the squared sigma
        scale = 1.0 if prediction == Velocity() else alpha**2
        assert loss == pytest.approx(np.mean(scale * left), rel=0.05)
        assert other > loss


@pytest.mark.nightly
def test_the_loss_of_a_clip_depends_on_neither_row_nor_neighbours():
    together = compute_losses(make_best_denoise(*FLOW), make_clip_rows([CLIPS], *FLOW, seeds=[[1, 2, 3]]))
    for number, clip in enumerate(CLIPS):
        alone = make_clip_rows([[clip]], *FLOW, seeds=[[number + 1]], room=0)
        losses = compute_losses(make_best_denoise(*FLOW), alone)
        np.testing.assert_allclose(losses[:, 0, 0], together[:, 0, number], rtol=1e-5)
    other = compute_losses(make_best_denoise(*FLOW), make_clip_rows([CLIPS], *FLOW, seeds=[[1, 2, 7]]))
    np.testing.assert_array_equal(other[:, 0, :2], together[:, 0, :2])
    assert (np.abs(other[:, 0, 2] - together[:, 0, 2]) > 1e-3).all()


def test_noise_differs_between_times():
    clips = make_clip_rows([draw_clips(2000)], *FLOW, seeds=[[1]])
    first, second = (np.asarray(clips.draw_noise("loss by time", number)).ravel() for number in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_tokens_without_noise_do_not_count():
    is_clean = np.zeros((1, 10), bool)
    is_clean[0, :2] = True
    clips = make_clip_rows([CLIPS[:1]], *FLOW, seeds=[[1]], is_clean=jnp.asarray(is_clean))
    losses = compute_losses(make_best_denoise(*FLOW), clips)
    plain = clips._replace(is_clean=None)
    noise = np.asarray(clips.draw_noise("loss by time", 0))
    predicted, _ = make_best_denoise(*FLOW)(0.75 * clips.data + 0.25 * noise, jnp.asarray(0.25), None)
    error = np.square(np.asarray(predicted) - (noise - np.asarray(clips.data)))[0]
    assert losses[0, 0, 0] == pytest.approx(error[2:6].mean(), rel=1e-5)
    assert compute_losses(make_best_denoise(*FLOW), plain)[0, 0, 0] == pytest.approx(error[:6].mean(), rel=1e-5)


def test_values_are_means_by_time_and_over_all_times():
    metric = LossByTime(bins=4)
    assert metric.times == (0.125, 0.375, 0.625, 0.875)
    assert list(metric.describe()) == ["denoising_loss", "loss_t0.12", "loss_t0.38", "loss_t0.62", "loss_t0.88"]
    values = metric.compute(metric.merge(((1.0, 2.0, 3.0, 6.0),), ((3.0, 2.0, 3.0, 8.0),)))
    assert [each.value for each in values.values()] == [3.5, 2.0, 2.0, 3.0, 7.0]
    assert values["denoising_loss"].count == 2
    assert values["loss_t0.38"].interval == (2.0, 2.0)
    assert {each.value for each in metric.compute(()).values()} == {None}
    assert len(set(LossByTime(bins=200).describe())) == 201


@pytest.mark.parametrize("options", [{"bins": 0}, {"seed": -1}])
def test_invalid_options_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        LossByTime(**options)
