"""Guidance: how the estimates of several conditionings are combined into one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.typing import AnyArray
from dit_video.diffusion.objective import DenoiseFn, Prediction, Velocity
from dit_video.diffusion.processes import MIN_ALPHA, Process, Times, Values


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjectedGuidance:
    """Adaptive projected guidance: steps lose their part parallel to the predicted data (arXiv 2410.02416).

    The parallel part causes saturation. With `momentum`, each step is a running sum over sampling steps of the
    differences between predictions of the data. The `GuidanceState` holds this sum.

    Raises:
      UserError: If `parallel_weight` is not finite, `max_rms` is not positive, or `momentum` is not between -1 and 1.
    """

    parallel_weight: float = 0.0
    """Factor of the parallel part, eta in the paper; 1 keeps all of it."""
    max_rms: float | None = None
    """Largest root mean square of a step over a sample, in units of the data; longer steps are shortened. The paper's r
    is this times the square root of the number of values: its 15 for latents of 4 × 128 × 128 is 0.06."""
    momentum: float = 0.0
    """Factor of the sum of earlier steps that is added to each step, beta in the paper; a negative factor (such as
    -0.5) removes their common part."""

    def __post_init__(self):
        if not math.isfinite(self.parallel_weight):
            raise UserError(f"parallel_weight={self.parallel_weight} is invalid: it must be finite. Use 0 to drop it.")
        if self.max_rms is not None and not 0 < self.max_rms < math.inf:
            raise UserError(f"max_rms={self.max_rms} is invalid: it must be positive. Use None for no limit.")
        if not -1 < self.momentum < 1:
            raise UserError(f"momentum={self.momentum} is invalid: it must lie between -1 and 1. Use 0 for none.")


@dataclass(frozen=True, kw_only=True)
class ZeroStarGuidance:
    r"""CFG-Zero*: an unconditional prediction of the best length, and first steps that change nothing.

    Guidance replaces the unconditional prediction $u$ by $s^\star u$. In each sample,
    $s^\star = \langle c, u \rangle / \lVert u \rVert^2$ brings it as close as possible to the conditional prediction
    $c$ (arXiv 2503.18886, section 4.1). The velocity of the first steps is zero, because a model's velocity is less
    accurate there than none (section 4.2). This is for models that predict velocities.

    Raises:
      UserError: If `zero_steps` is negative.
    """

    zero_steps: int = 1
    """Number of first steps, from pure noise on, whose velocity is zero; the paper sets it to 4 % of the steps."""

    def __post_init__(self):
        check_at_least(0, zero_steps=self.zero_steps)

    def get_zero_above(self, times: Float[np.ndarray, " n"]) -> Float32[np.ndarray, ""]:
        """Return the time above which the velocity is zero, given the times of all steps from noise to data.

        Raises:
          UserError: If no step is left after those with zero velocity.
        """
        if self.zero_steps >= len(times) - 1:
            rule = f"it must be below the number of steps, {len(times) - 1}. Use a smaller one, or more steps."
            raise UserError(f"zero_steps={self.zero_steps} is invalid: {rule}")
        return _to_float32(times[self.zero_steps])


@dataclass(frozen=True, kw_only=True)
class SkipLayerGuidance:
    r"""Guidance away from a weaker model: the same model under the same condition, without some of its layers.

    The weaker model predicts $c_l$, and the guided prediction becomes $g + w\,(c - c_l)$ (SLG of Stable Diffusion 3.5;
    STG for video, arXiv 2411.18664). It takes one more evaluation, at some of the steps.

    Raises:
      UserError: If there are no layers, one of them is negative or repeated, the scale is not finite, or `start` and
        `stop` are not rising within [0, 1].
    """

    layers: tuple[int, ...]
    """Numbers of the layers that are skipped, from 0 on; Stable Diffusion 3.5 Medium skips 7, 8 and 9."""
    scale: float = 2.8
    """Scale w of the difference."""
    start: float = 0.01
    """Share of the steps after which it begins; the first step never has it."""
    stop: float = 0.2
    """Share of the steps before which it ends."""

    def __post_init__(self):
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise UserError(f"layers={self.layers} is invalid: it needs different numbers of layers. Use (7, 8, 9).")
        if not math.isfinite(self.scale):
            raise UserError(f"scale={self.scale} of skip_layers is invalid: it must be finite. Use 0 for none.")
        if not 0 <= self.start < self.stop <= 1:
            rule = "they must be rising shares of the steps. Use start=0.01, stop=0.2."
            raise UserError(f"start={self.start}, stop={self.stop} is invalid: {rule}")

    def check(self, layers: int) -> None:
        """Check that a model has the layers, and further ones.

        Raises:
          UserError: If the model lacks one of the layers, or has no others.
        """
        if max(self.layers) >= layers or len(self.layers) == layers:
            rule = f"the model has {layers} layers, numbered from 0. Use some of these."
            raise UserError(f"skip_layers={self.layers} is invalid: {rule}")

    def get_params(self, times: Float[np.ndarray, " n"]) -> "SkipParams":
        """Return the parameters, given the times of all steps from noise to data."""
        steps = len(times) - 1
        first, last = int(self.start * steps) + 1, int(self.stop * steps) - 1
        bounds = (times[last], times[first]) if first <= last else (math.inf, -math.inf)
        interval = (_to_float32(bounds[0]), _to_float32(bounds[1]))
        return SkipParams(np.asarray(self.layers, np.int32), _to_float32(self.scale), interval)


class SkipParams(NamedTuple):
    """The numbers of `SkipLayerGuidance` that a compiled program takes as arguments."""

    layers: Int[AnyArray, " k"]
    scale: Float[AnyArray, ""]
    interval: tuple[Float[AnyArray, ""], Float[AnyArray, ""]]
    """Lowest and highest time of skip-layer guidance; it never applies if they do not rise."""


class GuidanceParams(NamedTuple):
    """The numbers of guidance that a compiled program takes as arguments; None for options that are off."""

    scale: Float[AnyArray, ""]
    image_scale: Float[AnyArray, ""] | None = None
    interval: tuple[Float[AnyArray, ""], Float[AnyArray, ""]] | None = None
    rescale: Float[AnyArray, ""] | None = None
    parallel_weight: Float[AnyArray, ""] | None = None
    max_rms: Float[AnyArray, ""] | None = None
    momentum: Float[AnyArray, ""] | None = None
    zero_above: Float[AnyArray, ""] | None = None
    """Time above which a velocity is zero; if set, the unconditional one is also scaled (see `ZeroStarGuidance`)."""
    skip: SkipParams | None = None


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Configuration of guidance: how strongly conditions are followed, at the cost of variety.

    Raises:
      UserError: If a scale is negative, `interval` is not an interval in [0, 1], or `rescale` lies outside [0, 1].
    """

    scale: float | tuple[float, float] = 2.0
    """Scale of the prompt; 1 is no guidance. A pair holds the scales of two experts, noisy times first."""
    image_scale: float | None = None
    """Scale of the conditions besides the prompt; None is 1, the model's own prediction, and needs no third branch."""
    interval: tuple[float, float] | None = None
    """First and last time of guidance, both included; None for all times (arXiv 2404.07724)."""
    rescale: float = 0.0
    """Interpolation weight, from 0 to 1, between the guided prediction and a rescaled one. The latter has the standard
    deviation of the conditional prediction, which large scales exceed (phi in arXiv 2305.08891, section 3.4)."""
    projection: AdaptiveProjectedGuidance | None = None
    """Adaptive projected guidance; None for none."""
    zero_star: ZeroStarGuidance | None = None
    """CFG-Zero*; None for none."""
    skip_layers: SkipLayerGuidance | None = None
    """Skip-layer guidance, which needs no scale above 1; None for none."""

    def __post_init__(self):
        scales = [*self.scales, *([] if self.image_scale is None else [self.image_scale])]
        if not all(0 <= scale < math.inf for scale in scales):
            raise UserError(
                f"guidance scales {', '.join(map(str, scales))} are invalid: each must be finite and not negative. "
                "Use 1 for no guidance."
            )
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"interval={self.interval} is invalid: it needs two times in [0, 1]. Use two rising times.")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale={self.rescale} is invalid: it must lie in [0, 1]. Use 0 for no rescaling.")
        if self.has_momentum and self.branch_count == 3:
            raise UserError(
                "momentum and image_scale are exclusive: momentum applies to the prompt's guidance alone. Use "
                "image_scale=1 or momentum=0."
            )
        if self.zero_star is not None and (self.projection is not None or self.branch_count == 3):
            raise UserError(
                "zero_star is exclusive with projection and image_scale: it changes the unconditional prediction. Use "
                "zero_star=None, or leave these out."
            )

    @property
    def scales(self) -> tuple[float, ...]:
        """Return the scale, or one for each of two experts."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def has_momentum(self) -> bool:
        """Return True if a sampling step depends on earlier ones; see `GuidanceState`."""
        return self.projection is not None and self.projection.momentum != 0 and self.branch_count > 1

    @property
    def branch_count(self) -> int:
        """Return the number of predictions per noisy value; a scale of 1 needs only one."""
        if self.image_scale not in (None, 1.0):
            return 3
        return 1 if set(self.scales) == {1.0} else 2

    @property
    def is_active(self) -> bool:
        """Return True if predictions are changed at all."""
        return self.branch_count > 1 or self.zero_star is not None or self.skip_layers is not None

    def get_params(self, expert: int = 0, *, times: Float[np.ndarray, " n"] | None = None) -> GuidanceParams:
        """Return the parameters of one expert.

        Args:
          expert: Number of the expert.
          times: Times of all steps, from noise to data; `zero_star` and `skip_layers` need them.

        Raises:
          UserError: If `zero_star` leaves no steps.
        """
        scale = self.scales[min(expert, len(self.scales) - 1)]
        optional = {
            "image_scale": self.image_scale if self.branch_count == 3 else None,
            "rescale": self.rescale or None,
            "parallel_weight": None if self.projection is None else self.projection.parallel_weight,
            "max_rms": None if self.projection is None else self.projection.max_rms,
            "momentum": self.projection.momentum if self.projection is not None and self.has_momentum else None,
        }
        interval = None if self.interval is None else (_to_float32(self.interval[0]), _to_float32(self.interval[1]))
        numbers: Any = {name: None if value is None else _to_float32(value) for name, value in optional.items()}
        zero_above = skip = None
        if self.zero_star is not None or self.skip_layers is not None:
            assert times is not None
            zero_above = None if self.zero_star is None else self.zero_star.get_zero_above(times)
            skip = None if self.skip_layers is None else self.skip_layers.get_params(times)
        return GuidanceParams(_to_float32(scale), interval=interval, zero_above=zero_above, skip=skip, **numbers)


def _to_float32(value: float | np.floating) -> Float32[np.ndarray, ""]:
    return np.asarray(value, np.float32)


Branches = Callable[[Values, Times, Any], tuple[Sequence[Values], Any]]
"""The function `branches(noisy, time, state) -> (predictions, state)`, a `DenoiseFn` with several predictions: with all
conditions, without the prompt and (the third, if any) without any condition."""

MeanFn = Callable[[Values], Float[Array, "*means"]]
"""A function that averages each sample's own values, in a shape that broadcasts against them."""


class GuidanceState(NamedTuple):
    """The state of a `denoise` with guidance, which the sampler carries from step to step."""

    momentum: Values | None = None
    """Running sum of guidance steps, in the sample's shape, initially zero; None without momentum."""
    branches: Any = None
    """State of the branches, as `sequential` or `batched` takes it; None if they have none."""


def apply_classifier_free_guidance(
    conditional: DenoiseFn, unconditional: DenoiseFn, scale: Float[Array, ""] | float
) -> DenoiseFn:
    """Return `u + scale * (c - u)`, with branches evaluated one by one; scale 1 is the conditional model."""
    return apply_guidance(sequential(conditional, unconditional), GuidanceParams(jnp.asarray(scale)))


def sequential(*branches: DenoiseFn) -> Branches:
    """Return branches that are evaluated one after another; their state is a tuple with each branch's state."""

    def evaluate(noisy, time, state):
        states = [None] * len(branches) if state is None else state
        pairs = [denoise(noisy, time, own) for denoise, own in zip(branches, states, strict=True)]
        predictions, next_states = zip(*pairs, strict=True)
        return predictions, None if state is None else next_states

    return evaluate


def batched(denoise: DenoiseFn, count: int) -> Branches:
    """Return branches that share one evaluation: `denoise` takes them, and their state, concatenated along axis 0."""

    def branches(noisy, time, state):
        times = jnp.concatenate([time] * count) if jnp.ndim(time) else time
        prediction, next_state = denoise(jnp.concatenate([noisy] * count), times, state)
        return jnp.split(prediction, count), next_state

    return branches


def alone(denoise: DenoiseFn, *, is_batched: bool) -> DenoiseFn:
    """Return the first branch, evaluated alone with the state of all of them: it goes on with its own, others' wait.

    Args:
      denoise: The first branch.
      is_batched: True if the state is that of `batched` branches, False if it is that of `sequential` ones.
    """

    def evaluate(noisy, time, state):
        if state is None:
            return denoise(noisy, time, None)
        if not is_batched:
            prediction, own = denoise(noisy, time, state[0])
            return prediction, (own, *state[1:])
        rows = len(noisy)
        prediction, own = denoise(noisy, time, jax.tree.map(lambda leaf: leaf[:rows], state))
        return prediction, jax.tree.map(lambda leaf, values: leaf.at[:rows].set(values), state, own)

    return evaluate


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

    Its state is a `GuidanceState`; None suffices if guidance has no momentum and the branches have no state.

    Args:
      branches: The predictions to combine.
      params: The parameters of guidance.
      conditional: The first branch `alone`. If set, only this is evaluated outside the interval, and time must be a
        scalar. Otherwise all branches are evaluated at all times.
      skipped: The first branch without the layers that skip-layer guidance skips; time must then be a scalar.
      mean: Mean over each sample's own values.
      process: The process, which projected guidance needs to compute the predicted data.
      prediction: The kind of the model's prediction.

    Raises:
      UserError: If projected guidance has no process, the prediction for CFG-Zero* is not a velocity, or the returned
        function has momentum and is called without momentum in its state.
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
            predicted, branch_state = conditional(noisy, time, state.branches)
            return prediction.extract_values(predicted), predicted, state._replace(branches=branch_state)

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

        A difference of predictions is a multiple of the difference of the data, so they have the same direction. At
        pure noise some predictions do not determine the data; the step is then used without momentum, and not kept.
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
    """Return the guided prediction and the next momentum."""
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
