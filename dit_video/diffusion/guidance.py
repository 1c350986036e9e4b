"""Guidance: how strongly each condition of a model is followed, and the predictions that this takes."""

import functools
import math
import numbers
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.diffusion.guidance_methods import ClassifierFreeGuidance, GuidanceInputs, GuidanceMethod, MeanFn
from dit_video.diffusion.objective import DenoiseFn, Prediction, Velocity
from dit_video.diffusion.processes import Process, Times, Values

TEXT = "text"
"""Name of the prompt among the conditions that guidance has a scale for."""
Scale = float | tuple[float, float]
"""Scale of a condition, or one for each of two experts, noisy times first."""


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

    scales: tuple[Float[AnyArray, ""], ...] = ()
    """Scale of each condition; the first prediction is used as it is if there are none."""
    combine: jax.tree_util.Partial = jax.tree_util.Partial(ClassifierFreeGuidance.combine, params={})
    """The method's function of `GuidanceInputs` and a state, with its numbers."""
    interval: tuple[Float[AnyArray, ""], Float[AnyArray, ""]] | None = None
    rescale: Float[AnyArray, ""] | None = None
    zero_above: Float[AnyArray, ""] | None = None
    """Time above which the prediction is zero."""
    skip: SkipParams | None = None


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Configuration of guidance: how strongly conditions are followed, at the cost of variety.

    Raises:
      UserError: If a scale is no finite number from 0 on, the method does not combine as many predictions,
        `interval` is not an interval in [0, 1], or `rescale` lies outside [0, 1].
    """

    scales: Mapping[str, Scale] = field(default_factory=lambda: {TEXT: 2.0}, hash=False)
    """Scale of each condition by its name; 1 is no guidance. `text` is the prompt, whose place the negative prompt
    takes, `image` the known frames, and another conditioning has the name of its field. Conditions are dropped in the
    order given: the first scale is of the difference between predictions with all conditions and without the first,
    the second of that between the latter and one without the first two."""
    method: GuidanceMethod = ClassifierFreeGuidance()
    """Way in which the predictions are combined."""
    interval: tuple[float, float] | None = None
    """First and last time of guidance, both included; None for all times (arXiv 2404.07724)."""
    rescale: float = 0.0
    """Interpolation weight, from 0 to 1, between the guided prediction and a rescaled one. The latter has the standard
    deviation of the conditional prediction, which large scales exceed (phi in arXiv 2305.08891, section 3.4)."""
    skip_layers: SkipLayerGuidance | None = None
    """Skip-layer guidance, which needs no scale above 1; None for none."""

    def __post_init__(self):
        object.__setattr__(self, "scales", _read_scales(self.scales))
        if any(self.get_scale(TEXT, expert) < 1 for expert in range(self.expert_count)):
            warnings.warn(
                f"guidance={self.scales[TEXT]} weakens the prompt: 1 is no guidance, and 0 samples the negative prompt "
                "alone (in other projects all scales up to 1 are no guidance)",
                stacklevel=4,
            )
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"interval={self.interval} is invalid: it needs two times in [0, 1]. Use two rising times.")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale={self.rescale} is invalid: it must lie in [0, 1]. Use 0 for no rescaling.")
        self.method.check(self.branch_count)

    @classmethod
    def upgrade_json(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """Return fields in the place of those that were written when the prompt's `scale` was a field."""
        if "scale" not in fields:
            return fields
        image, projection, zero_star = (fields.pop(name, None) for name in ("image_scale", "projection", "zero_star"))
        scales = {TEXT: fields.pop("scale")} | ({} if image is None else {"image": image})
        method = projection or zero_star
        return fields | {"scales": scales} | ({} if method is None else {"method": method})

    @property
    def expert_count(self) -> int:
        """Return 2 if a condition has a scale for each of two experts, or else 1."""
        return 2 if any(isinstance(scale, tuple) for scale in self.scales.values()) else 1

    @property
    def branch_count(self) -> int:
        """Return the number of predictions per noisy value."""
        return max(map(self.count_branches, range(self.expert_count)))

    @property
    def dropped(self) -> tuple[str, ...]:
        """Return the names of the conditions that predictions lack, each prediction one more than that before."""
        return tuple(self.scales)[: self.branch_count - 1]

    @property
    def has_state(self) -> bool:
        """Return True if a sampling step depends on earlier ones."""
        noisy = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
        return self.branch_count > 1 and jax.eval_shape(self.method.init_state, noisy) is not None

    def count_branches(self, expert: int) -> int:
        """Return the number of predictions of an expert: last conditions whose scale is 1 need none."""
        needed = [number for number, name in enumerate(self.scales, 2) if self.get_scale(name, expert) != 1]
        return max(needed, default=1)

    def get_scale(self, name: str, expert: int = 0) -> float:
        """Return the scale of a condition for an expert; 1 if it has none."""
        scale = self.scales.get(name, 1.0)
        return scale[min(expert, len(scale) - 1)] if isinstance(scale, tuple) else scale

    def init_state(self, noisy: Values) -> "GuidanceState | None":
        """Return the state of a `denoise` with this guidance before the first step; None if it has none."""
        state = self.method.init_state(noisy) if self.branch_count > 1 else None
        return None if state is None else GuidanceState(method=state)

    def get_params(
        self, times: Float[np.ndarray, " n"], *, expert: int = 0, branch_count: int | None = None
    ) -> GuidanceParams | None:
        """Return the parameters of one expert; None if its first prediction is used as it is.

        Args:
          times: Times of all steps, from noise to data.
          expert: Number of the expert.
          branch_count: Number of predictions that are combined; by default those that the expert needs.

        Raises:
          UserError: If the method leaves no steps.
        """
        count = self.count_branches(expert) if branch_count is None else branch_count
        zero_above = self.method.get_zero_above(times)
        skip = None if self.skip_layers is None else self.skip_layers.get_params(times)
        if count == 1 and zero_above is None and skip is None:
            return None
        params = {
            name: None if value is None else _to_float32(value) for name, value in self.method.get_params().items()
        }
        return GuidanceParams(
            scales=tuple(_to_float32(self.get_scale(name, expert)) for name in tuple(self.scales)[: count - 1]),
            combine=jax.tree_util.Partial(type(self.method).combine, params=params),
            interval=None if self.interval is None else (_to_float32(self.interval[0]), _to_float32(self.interval[1])),
            rescale=_to_float32(self.rescale) if self.rescale else None,
            zero_above=None if zero_above is None else _to_float32(zero_above),
            skip=skip,
        )


def _read_scales(scales: Any) -> OrderedDict[str, Scale]:
    """Return scales in a mapping that equals another one only if the order is the same."""
    if not isinstance(scales, Mapping):
        raise UserError(
            f'guidance scales={scales!r} are invalid: they need the names of conditions. Use {{"text": 5}}.'
        )
    read: OrderedDict[str, Scale] = OrderedDict()
    for name, value in scales.items():
        values = tuple(value) if isinstance(value, tuple | list) else (value,)
        if len(values) not in (1, 2) or not all(_is_number(each) and 0 <= each < math.inf for each in values):
            rule = "each must be a finite number from 0 on, or a pair of them for two experts"
            raise UserError(f"guidance scales={dict(scales)} are invalid: {rule}. Use 1 for no guidance.")
        first, *others = map(float, values)
        read[name] = (first, others[0]) if others else first
    return read


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _to_float32(value: float | np.floating) -> Float32[np.ndarray, ""]:
    return np.asarray(value, np.float32)


Branches = Callable[[Values, Times, Any], tuple[Sequence[Values], Any]]
"""The function `branches(noisy, time, state) -> (predictions, state)`, a `DenoiseFn` with several predictions: with all
conditions, and then without one more each."""


class GuidanceState(NamedTuple):
    """The state of a `denoise` with guidance, which the sampler carries from step to step."""

    method: Any = None
    """State of the method, such as momentum; None if it has none."""
    branches: Any = None
    """State of the branches, as `sequential` or `batched` takes it; None if they have none."""


def apply_classifier_free_guidance(
    conditional: DenoiseFn, unconditional: DenoiseFn, scale: Float[Array, ""] | float
) -> DenoiseFn:
    """Return `u + scale * (c - u)`, with branches evaluated one by one; scale 1 is the conditional model."""
    return apply_guidance(sequential(conditional, unconditional), GuidanceParams((jnp.asarray(scale),)))


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

    Its state is a `GuidanceState`; None suffices if neither the method nor the branches have one.

    Args:
      branches: The predictions to combine, one more than there are scales, or one that is used as it is.
      params: The parameters of guidance.
      conditional: The first branch `alone`. If set, only this is evaluated outside the interval, and time must be a
        scalar. Otherwise all branches are evaluated at all times.
      skipped: The first branch without the layers that skip-layer guidance skips; time must then be a scalar.
      mean: Mean over each sample's own values.
      process: The process, which a method that computes the predicted data needs.
      prediction: The kind of the model's prediction.

    Raises:
      UserError: If the method has a prediction of zero in the first steps, and it is not a velocity. The returned
        function raises it if projected guidance has no process, or momentum no state.
    """
    if params.zero_above is not None and not isinstance(prediction, Velocity):
        rule = "the prediction of the first steps is zero, as a velocity can be. Use another method."
        raise UserError(f"the method of guidance is invalid for {type(prediction).__name__}: {rule}")

    def combine(noisy, time, state, is_inside=None):
        """Return the guided values, or the first branch's where `is_inside` is False, and its whole prediction."""
        predictions, branch_state = branches(noisy, time, state.branches)
        values = [prediction.extract_values(predicted) for predicted in predictions]
        guided, method_state = values[0], state.method
        if len(values) > 1:
            inputs = GuidanceInputs(values, params.scales, noisy, time, process, prediction, mean)
            guided, method_state = params.combine(inputs, state=state.method)
        if is_inside is not None:
            guided = jnp.where(is_inside, guided, values[0])
            keep = functools.partial(jnp.where, is_inside)
            method_state = jax.tree.map(keep, method_state, state.method)
        return guided, predictions[0], state._replace(method=method_state, branches=branch_state)

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


def _is_inside(time: Times, interval: tuple[AnyArray, AnyArray]) -> Array:
    return (jnp.asarray(interval[0]) <= time) & (time <= jnp.asarray(interval[1]))


def _rescale(guided: Array, c: Array, weight: AnyArray, mean: MeanFn) -> Array:
    """Interpolate between guided values and those with the standard deviation of the conditional ones."""
    deviation = _compute_std(guided, mean)
    ratio = jnp.where(deviation > 0, _compute_std(c, mean) / jnp.where(deviation > 0, deviation, 1.0), 1.0)
    return guided * (1 + weight * (ratio - 1))


def _compute_std(values: Array, mean: MeanFn) -> Array:
    return jnp.sqrt(mean(jnp.square(values - mean(values))))
