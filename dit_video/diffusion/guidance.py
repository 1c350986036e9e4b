r"""Guidance: a `denoise` that combines several predictions.

With a model's prediction $c$ under the condition and $u$ without it, or under a negative prompt, classifier-free
guidance of scale $s$ is (arXiv 2207.12598)

$$g = u + s\,(c - u) = c + (s - 1)(c - u)$$

Predictions of one noisy value differ by multiples of the difference in the data, so $g$ is the same for every kind of
prediction. A third branch $b$, without the conditioning image too, has its own scale $s_i$ (arXiv 2211.09800, eq. 3):

$$g = b + s_i\,(u - b) + s\,(c - u) = c + (s - 1)(c - u) + (s_i - 1)(u - b)$$

The remaining options modify these sums: guidance only at some times (`interval`), the standard deviation of $c$
(`rescale`), steps $c - u$ orthogonal to $c$ itself (`AdaptiveProjectedGuidance`), $u$ scaled to the best length
(`ZeroStarGuidance`), or a step away from the prediction without some layers (`SkipLayerGuidance`). **Statistics are per
sample**; `mean` defines which values form one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.diffusion.guidance_config import GuidanceParams
from dit_video.diffusion.predictions import DenoiseFn, Prediction, Velocity
from dit_video.diffusion.processes.process import MIN_ALPHA, Process, Times, Values

Branches = Callable[[Values, Times, Any], tuple[Sequence[Values], Any]]
"""The function `branches(noisy, time, state) -> (predictions, state)`, a `DenoiseFn` of several predictions: with all
conditions, without the prompt and (of three) without any."""

MeanFn = Callable[[Values], Float[Array, "*means"]]
"""A function that averages each sample's own values, in a shape that broadcasts against them."""


class GuidanceState(NamedTuple):
    """The state of a `denoise` with guidance, which the sampler carries from step to step."""

    momentum: Values | None = None
    """Running sum of the steps of guidance, of the shape of the sample, at first zero; None without momentum."""
    branches: Any = None
    """State of the branches; None if they have none."""
    conditional: Any = None
    """State of the first branch where it is evaluated alone, which it is at other times than the branches."""


def apply_classifier_free_guidance(
    conditional: DenoiseFn, unconditional: DenoiseFn, scale: Float[Array, ""] | float
) -> DenoiseFn:
    """Return `u + scale * (c - u)`, with branches evaluated one by one; scale 1 is the conditional model."""
    return apply_guidance(sequential(conditional, unconditional), GuidanceParams(jnp.asarray(scale)))


def sequential(*branches: DenoiseFn) -> Branches:
    """Return branches that are evaluated one after the other; their state is a tuple with that of each."""

    def evaluate(noisy, time, state):
        states = [None] * len(branches) if state is None else state
        pairs = [denoise(noisy, time, own) for denoise, own in zip(branches, states, strict=True)]
        predictions, next_states = zip(*pairs, strict=True)
        return predictions, None if state is None else next_states

    return evaluate


def batched(denoise: DenoiseFn, count: int) -> Branches:
    """Return branches that share one evaluation: `denoise` takes them concatenated along the first axis."""

    def branches(noisy, time, state):
        times = jnp.concatenate([time] * count) if jnp.ndim(time) else time
        prediction, next_state = denoise(jnp.concatenate([noisy] * count), times, state)
        return jnp.split(prediction, count), next_state

    return branches


def average_per_sample(values: Float[Array, "B *shape"]) -> Float[Array, "B *ones"]:
    """Return the mean over all axes but the first."""
    return values.mean(axis=tuple(range(1, values.ndim)), keepdims=True)


def apply_guidance(
    branches: Branches,
    params: GuidanceParams,
    *,
    conditional: DenoiseFn | None = None,
    skipped: DenoiseFn | None = None,
    mean: MeanFn = average_per_sample,
    process: Process | None = None,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
) -> DenoiseFn:
    """Return a `denoise` with guidance.

    Its state is a `GuidanceState`; None serves guidance without momentum of branches without state.

    Args:
      branches: The predictions to combine.
      params: The parameters of guidance.
      conditional: The first branch alone. If set, it is all that is evaluated outside of the interval, and time must be
        a scalar. Otherwise all branches are evaluated at all times.
      skipped: The first branch without the layers that skip-layer guidance skips, for which time must be a scalar.
      mean: Mean over each sample's own values.
      process: The process, which projected guidance needs to compute the predicted data.
      prediction: The kind of the model's prediction.

    Raises:
      UserError: If projected guidance has no process, CFG-Zero* another prediction than velocities, or the returned
        function with momentum is called without one in its state.
    """
    projection = None
    if params.parallel_weight is not None:
        if process is None:
            raise UserError("process=None is invalid: projected guidance computes the predicted data. Use process=...")
        projection = _Projection(process, prediction, mean, params.parallel_weight, params.max_rms, params.momentum)

    if params.zero_above is not None and not isinstance(prediction, Velocity):
        rule = "a model's prediction must be a velocity, which can be zero. Use zero_star=None."
        raise UserError(f"zero_star is invalid for {type(prediction).__name__}: {rule}")

    def combine(noisy, time, state, is_inside=None):
        """Return the guided values, or the first branch's where `is_inside` is False, and its whole prediction."""
        predictions, branch_state = branches(noisy, time, state.branches)
        values = [prediction.extract_values(predicted) for predicted in predictions]
        guided, momentum = _combine(values, params, noisy, time, projection, mean, state.momentum)
        if is_inside is not None:
            guided = jnp.where(is_inside, guided, values[0])
            momentum = None if momentum is None else jnp.where(is_inside, momentum, state.momentum)
        return guided, predictions[0], state._replace(momentum=momentum, branches=branch_state)

    def guide(noisy, time, state):
        """Return the guided values, the first branch's prediction, and the next state."""
        if params.interval is None:
            return combine(noisy, time, state)
        is_inside = _is_inside(time, params.interval)
        if conditional is None:
            return combine(noisy, time, state, is_inside)

        def evaluate_alone():
            predicted, conditional_state = conditional(noisy, time, state.conditional)
            return prediction.extract_values(predicted), predicted, state._replace(conditional=conditional_state)

        return jax.lax.cond(is_inside, lambda: combine(noisy, time, state), evaluate_alone)

    def evaluate(noisy, time, state):
        guided, predicted, next_state = guide(noisy, time, state)
        values = prediction.extract_values(predicted)
        if (skip := params.skip) is not None:
            assert skipped is not None

            def add_step():
                weaker, _ = skipped(noisy, time, None)
                return guided + skip.scale * (values - prediction.extract_values(weaker))

            guided = jax.lax.cond(_is_inside(time, skip.interval), add_step, lambda: guided)
        if params.rescale is not None:
            guided = _rescale(guided, values, params.rescale, mean)
        variance = predicted[..., values.shape[-1] :]  # A learned variance, which is not guided.
        return jnp.concatenate([guided, variance], axis=-1) if variance.size else guided, next_state

    def denoise(noisy, time, state):
        if params.momentum is not None and (state is None or state.momentum is None):
            raise UserError(
                "a state without momentum is invalid: this guidance sums its steps. Use "
                "state=GuidanceState(momentum=jnp.zeros_like(noise))."
            )
        first_state = GuidanceState() if state is None else state
        if (zero_above := params.zero_above) is None:
            output, next_state = evaluate(noisy, time, first_state)
        else:
            output, next_state = jax.lax.cond(
                time > zero_above,
                lambda: (jnp.zeros_like(noisy), first_state),
                lambda: evaluate(noisy, time, first_state),
            )
        return output, None if state is None else next_state

    return denoise


class _Projection(NamedTuple):
    process: Process
    prediction: Prediction
    mean: MeanFn
    parallel_weight: AnyArray
    max_rms: AnyArray | None
    momentum: AnyArray | None

    def __call__(
        self, step: Array, predicted: Array, noisy: Array, time: Array, momentum: Array | None
    ) -> tuple[Array, Array | None]:
        """Return the projected `step`, a difference of predictions, and the next momentum.

        A difference of predictions is a multiple of the difference of the data, so their directions are the same. At
        pure noise some predictions do not determine the data: there the step is used without momentum, and not kept.
        """
        if momentum is not None and self.momentum is not None:
            determinant = self.prediction.determinant(self.process, time)
            data_scale = jnp.where(jnp.abs(determinant) > MIN_ALPHA, self.process.sigma(time) / determinant, 0.0)
            momentum = data_scale * step + jnp.asarray(self.momentum) * momentum
            step = jnp.where(data_scale == 0, step, momentum / jnp.where(data_scale == 0, 1.0, data_scale))
        x = noisy / self.process.input_scale(time)
        data = Prediction.estimate(self.prediction, self.process, x, predicted, time).data  # of values alone
        parallel = self.mean(step * data) / jnp.maximum(self.mean(data * data), 1e-12)
        projected = step + (self.parallel_weight - 1) * parallel * data
        if self.max_rms is None:
            return projected, momentum
        rms = self.prediction.data_error_scale(self.process, time) * jnp.sqrt(self.mean(step * step))
        return jnp.minimum(1.0, self.max_rms / jnp.maximum(rms, 1e-12)) * projected, momentum


def _combine(
    predictions: Sequence[Array],
    params: GuidanceParams,
    noisy: Array,
    time: Array,
    projection: _Projection | None,
    mean: MeanFn,
    momentum: Array | None,
) -> tuple[Array, Array | None]:
    """Return the guided prediction (see the module docstring), and the next momentum."""
    if len(predictions) == 1:
        return predictions[0], momentum
    c, u = predictions[:2]
    if params.zero_above is not None:
        norm = mean(u * u)
        u = jnp.where(norm > 0, mean(c * u) / jnp.where(norm > 0, norm, 1.0), 0.0) * u
    if projection is None:
        guided = u + params.scale * (c - u)
    else:
        step, momentum = projection(c - u, c, noisy, time, momentum)
        guided = c + (params.scale - 1) * step
    if params.image_scale is not None:
        step = u - predictions[2]
        step = step if projection is None else projection(step, c, noisy, time, None)[0]
        guided = guided + (params.image_scale - 1) * step
    return guided, momentum


def _is_inside(time: Times, interval: tuple[AnyArray, AnyArray]) -> Array:
    return (jnp.asarray(interval[0]) <= time) & (time <= jnp.asarray(interval[1]))


def _rescale(guided: Array, c: Array, weight: AnyArray, mean: MeanFn) -> Array:
    """Interpolate between guided values and those with the standard deviation of the conditional ones."""
    deviation = _compute_std(guided, mean)
    ratio = jnp.where(deviation > 0, _compute_std(c, mean) / jnp.where(deviation > 0, deviation, 1.0), 1.0)
    return guided * (1 + weight * (ratio - 1))


def _compute_std(values: Array, mean: MeanFn) -> Array:
    return jnp.sqrt(mean(jnp.square(values - mean(values))))
