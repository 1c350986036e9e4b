"""The likelihood of clips of the data under the model, in bits for each value of their latents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError, check_at_least
from dit_video.diffusion import DenoiseFn, ProbeTrace, Process, log_likelihood
from dit_video.evaluation.denoiser_measures import measure_clips
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.sampling.clip_functions import ClipFunction, PackedLatents


@dataclass(frozen=True, kw_only=True)
class LatentLikelihood(ClipFunction):
    """The negative log-density of latents under the probability flow, in bits for each value."""

    steps: int
    """Number of steps of Heun's rule."""
    probes: int
    """Number of vectors of random signs that estimate the divergence of a clip's flow."""
    min_ratio: float
    """Ratio of noise to data at which the latents enter the flow."""

    def __call__(self, denoise: DenoiseFn, clips: PackedLatents) -> Float[Array, "1 B G"]:
        """Return the bits of every clip.

        Raises:
          UserError: a model that gets some tokens without noise: they have no density.
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

        The angle $\arctan(\sigma / \alpha)$ is the coordinate that the flow is integrated along.
        """
        one = np.ones(1)
        last = math.atan2(process.sigma(one).item(), process.alpha(one).item())
        roots = np.linspace(math.sqrt(last), math.sqrt(math.atan(self.min_ratio)), self.steps + 1)
        times = process.ratio_to_time(np.tan(np.square(roots)))
        return np.append(1.0, np.asarray(times)[1:]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class BitsPerDimension(MeanMetric):
    """Negative log-likelihood of clips of the data under the model, in bits for each value of their latents.

    The probability flow ODE takes the latents to noise, whose density is known, by Heun's rule; the change of density
    on the way is the integral of the divergence (arXiv 1810.01367; 2011.13456, section 4.3), which Hutchinson's
    estimate has of random signs that are a function of the seed and the clip. Without guidance, under the clips'
    captions. The density is that of continuous latents, so that a value may be negative, and models compare if they
    have one autoencoder.

    Raises:
      UserError: no steps or probes, a ratio that is not between 0 and 1, or a negative seed.
    """

    needs, name = ("real_clips", "pipeline"), "bits_per_dimension"
    description = MetricDescription(
        label="negative log-likelihood",
        unit="bits/dim",
        is_higher_better=False,
        explanation="of continuous latents, for each of their values; comparable for one autoencoder only",
    )
    steps: int = 32
    """Number of steps of Heun's rule, with two evaluations and derivatives of the model each."""
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
