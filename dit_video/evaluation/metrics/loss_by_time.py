"""The denoiser's loss on clips of the data at fixed times and noise."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import check_at_least
from dit_video.diffusion import DenoiseFn, Objective
from dit_video.evaluation.denoiser_measures import measure_clips
from dit_video.evaluation.metrics.intervals import compute_mean_interval
from dit_video.evaluation.metrics.metric import ExampleMetric, MetricBatch, MetricDescription, MetricValue
from dit_video.sampling.clip_functions import ClipFunction, PackedLatents

LOSS_PREFIX = "loss_t"
"""Start of the names of the losses at single times, which the time follows."""


@dataclass(frozen=True, kw_only=True)
class DenoisingLoss(ClipFunction):
    """The mean squared error of the prediction at each of some times."""

    times: tuple[float, ...]
    """Diffusion times."""

    def __call__(self, denoise: DenoiseFn, clips: PackedLatents) -> Float[Array, "times B G"]:
        """Return the losses of every clip: means over its tokens, but for those that the model gets without noise."""
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
    weights and the distribution of times of training: models of one prediction, process and autoencoder compare.
    Captions are the clips' own. A clip has the same noise at the same time in every model.

    Raises:
      UserError: no bins, or a negative seed.
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
