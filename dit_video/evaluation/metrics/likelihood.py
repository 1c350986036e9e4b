"""Metrics of a model on data clips: loss by time, and bits per dimension."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion import DenoiseFn, Objective, ProbeTrace, Process, log_likelihood
from dit_video.evaluation.denoiser_measures import measure_clips
from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MeanMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    compute_mean_interval,
)
from dit_video.sampling.clip_functions import ClipFunction, PackedLatents

LOSS_PREFIX = "loss_t"
"""Prefix of the names of losses at single times, which the time follows."""


@dataclass(frozen=True, kw_only=True)
class DenoisingLoss(ClipFunction):
    """The prediction's mean squared error at several times."""

    times: tuple[float, ...]
    """Diffusion times."""

    def __call__(self, denoise: DenoiseFn, clips: PackedLatents) -> Float[Array, "times B G"]:
        """Return the losses of every clip: means over its tokens, except those that the model gets without noise."""
        objective = Objective(process=clips.process, prediction=clips.prediction)
        layout = clips.rows.layout
        is_counted = jnp.ones(clips.data.shape[:2]) if clips.is_clean is None else 1.0 - clips.is_clean

        def compute_loss(number_and_time):
            number, time = number_and_time
            noise = clips.draw_noise("loss by time", number)
            token_times = jnp.full(clips.data.shape[:2], time)

            def denoise_at_time(noisy, token_times, state):
                return denoise(noisy, time, state)

            loss = objective.loss(denoise_at_time, clips.data, noise, token_times, cond_mask=clips.is_clean)
            return layout.mean(loss) / jnp.maximum(layout.mean(is_counted), jnp.finfo(jnp.float32).tiny)

        numbers = jnp.arange(len(self.times))
        return jax.lax.map(compute_loss, (numbers, jnp.asarray(self.times, jnp.float32)))


@dataclass(frozen=True, kw_only=True)
class LossByTime(ExampleMetric[tuple[float, ...]]):
    """Loss of the denoiser at the midpoints of equal bins of diffusion time, and its mean over them.

    It is the mean squared error of the quantity that the model predicts (velocity, noise, …), in latents, without the
    loss weights and time distribution of training. Models with the same prediction, process and autoencoder are
    comparable. Captions are the clips' own. A clip has the same noise at the same time in every model.

    Raises:
      UserError: If there are no bins, or the seed is negative.
    """

    needs = ("real_clips", "pipeline")
    bins: int = 8
    """Number of bins of diffusion time, at whose midpoints the loss is computed."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self):
        check_at_least(1, bins=self.bins)
        check_at_least(0, seed=self.seed)

    @property
    def times(self) -> tuple[float, ...]:
        """Return the diffusion times, from data to noise."""
        return tuple((number + 0.5) / self.bins for number in range(self.bins))

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        decimals = max(2, len(str(self.bins)))
        return tuple(f"{LOSS_PREFIX}{time:.{decimals}f}" for time in self.times)

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the descriptions of the mean and of the loss at each time."""
        explanation = (
            "mean squared error of the model's prediction in latents, unweighted, at uniform times and fixed noise; "
            "comparable for one prediction and autoencoder"
        )
        mean = MetricDescription(label="denoising loss", decimals=4, is_higher_better=False, explanation=explanation)
        at_times = {
            name: MetricDescription(
                label=f"denoising loss at time {name.removeprefix(LOSS_PREFIX)}",
                decimals=4,
                is_higher_better=False,
                is_headline=False,
                explanation="0 is data, 1 is noise",
            )
            for name in self._names
        }
        return {"denoising_loss": mean, **at_times}

    def measure(self, batch: MetricBatch) -> Sequence[tuple[float, ...]]:
        """Return the loss of every clip at every time."""
        assert batch.pipeline is not None  # a need of this metric
        losses = measure_clips(batch.pipeline, batch.real_clips, DenoisingLoss(times=self.times), seed=self.seed)
        return [tuple(each) for each in losses.tolist()]

    def list_examples(self, state: tuple[tuple[float, ...], ...]) -> Sequence[Mapping[str, float | bool]]:
        """Return the mean loss of every clip."""
        return [{"denoising_loss": float(np.mean(losses))} for losses in state]

    def compute(self, state: tuple[tuple[float, ...], ...]) -> Mapping[str, MetricValue]:
        """Return the means over clips, with Student's intervals."""
        losses = np.asarray(state, np.float64).reshape(len(state), self.bins)
        columns = {"denoising_loss": losses.mean(axis=1), **dict(zip(self._names, losses.T, strict=True))}
        return {
            name: MetricValue(
                value=float(values.mean(axis=0)) if len(values) else None,
                interval=compute_mean_interval(values.tolist()),
                count=len(values),
            )
            for name, values in columns.items()
        }


@dataclass(frozen=True, kw_only=True)
class LatentLikelihood(ClipFunction):
    """The negative log-density of latents under the probability flow, in bits per value."""

    steps: int
    """Number of steps of Heun's rule."""
    probes: int
    """Number of vectors of random signs that estimate the divergence of a clip's flow."""
    min_ratio: float
    """Ratio of noise to data at which the latents enter the flow."""

    def __call__(self, denoise: DenoiseFn, clips: PackedLatents) -> Float[Array, "1 B G"]:
        """Return the bits of every clip.

        Raises:
          UserError: If the model gets some tokens without noise: they have no density.
        """
        if clips.is_clean is not None:
            rule = "this model gets parts of a clip without noise, which have no density"
            raise UserError(f"bits_per_dimension is invalid: {rule}. Leave the metric out")
        layout = clips.rows.layout
        tokens = jnp.arange(1, layout.count + 1) == jnp.asarray(clips.rows.segments)[..., None]
        counts = tokens.sum(axis=1) * clips.data.shape[-1]
        signs = jax.lax.map(lambda number: jnp.sign(clips.draw_noise("probes", number)), jnp.arange(self.probes))
        likelihood = log_likelihood(
            denoise,
            clips.data,
            jnp.asarray(self.make_times(clips.process)),
            process=clips.process,
            prediction=clips.prediction,
            divergence=ProbeTrace(signs),
            sum_values=lambda values: layout.mean(values.mean(axis=-1)) * counts,
        )
        return likelihood.bits_per_dimension[None]

    def make_times(self, process: Process) -> Float32[np.ndarray, " times"]:
        r"""Return falling times at angles whose roots are uniformly spaced: most steps are near the data.

        The flow is integrated along the angle $\arctan(\sigma / \alpha)$.
        """
        one = np.ones(1)
        last = math.atan2(process.sigma(one).item(), process.alpha(one).item())
        roots = np.linspace(math.sqrt(last), math.sqrt(math.atan(self.min_ratio)), self.steps + 1)
        times = process.ratio_to_time(np.tan(np.square(roots)))
        return np.append(1.0, np.asarray(times)[1:]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class BitsPerDimension(MeanMetric):
    """Negative log-likelihood of data clips under the model, in bits per latent value.

    The probability flow ODE takes the latents to noise, whose density is known, by Heun's rule; the change of density
    on the way is the integral of the divergence (arXiv 1810.01367; 2011.13456, section 4.3). Hutchinson's method
    estimates the divergence with random signs, which depend on the seed and the clip. The model runs without guidance,
    under the clips' captions. As latents are continuous, a value may be negative, and only models with the same
    autoencoder are comparable.

    Raises:
      UserError: If there are no steps or probes, the ratio is not between 0 and 1, or the seed is negative.
    """

    needs, name = ("real_clips", "pipeline"), "bits_per_dimension"
    description = MetricDescription(
        label="negative log-likelihood",
        unit="bits/dim",
        is_higher_better=False,
        explanation="of continuous latents, for each of their values; comparable for one autoencoder only",
    )
    steps: int = 32
    """Number of steps of Heun's rule, each with two evaluations and derivatives of the model."""
    probes: int = 1
    """Number of vectors of random signs for each clip."""
    min_ratio: float = 0.002
    """Ratio of noise to data at which the latents enter the flow: models do not know cleaner data."""
    seed: int = 0
    """Seed of the signs."""

    def __post_init__(self):
        check_at_least(1, steps=self.steps, probes=self.probes)
        check_at_least(0, seed=self.seed)
        if not 0 < self.min_ratio < 1:
            raise UserError(f"min_ratio={self.min_ratio} is invalid: it must be between 0 and 1. Use 0.002")

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the bits of every clip."""
        assert batch.pipeline is not None  # a need of this metric
        function = LatentLikelihood(steps=self.steps, probes=self.probes, min_ratio=self.min_ratio)
        bits = measure_clips(batch.pipeline, batch.real_clips, function, seed=self.seed)
        return bits.ravel().tolist()
