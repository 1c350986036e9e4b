"""Methods of guidance: how predictions with and without some conditions become one."""

import abc
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.registry import find_named
from dit_video.core.typing import AnyArray
from dit_video.diffusion.objective import Prediction
from dit_video.diffusion.processes import MIN_ALPHA, Process, Times, Values

MeanFn = Callable[[Values], Float[Array, "*means"]]
"""A function that averages each sample's own values, in a shape that broadcasts against them."""


class GuidanceInputs(NamedTuple):
    """Predictions of a model at one diffusion time, which `GuidanceMethod.combine` turns into one."""

    predictions: Sequence[Values]
    """Predictions under all conditions, and then without one condition more each; two or more."""
    scales: Sequence[Float[AnyArray, ""]]
    """Scale of each condition, in the order in which the predictions lack them: one less than there are predictions."""
    noisy: Values
    """Input of the model."""
    time: Times
    process: Process | None
    prediction: Prediction
    """Kind of the predictions."""
    mean: MeanFn


class GuidanceMethod(abc.ABC):
    """A way to combine predictions with and without some conditions, as a frozen dataclass.

    `combine` is compiled once for a class: it reads numbers from `params`, so that other numbers compile nothing. A
    config can hold another package's subclass after `dit_video.core.registry.register`.
    """

    @staticmethod
    @abc.abstractmethod
    def combine(inputs: GuidanceInputs, params: Mapping[str, Any], state: Any) -> tuple[Values, Any]:
        """Return the guided prediction, and the next state.

        Args:
          inputs: Predictions, their scales, and where they come from.
          params: The numbers of `get_params`, as arrays.
          state: What this returned at the step before, first `init_state`.
        """

    def get_params(self) -> dict[str, float | None]:
        """Return the numbers that `combine` gets, None for those that are off; by default the fields."""
        return dict(vars(self))

    def init_state(self, noisy: Values) -> Any:
        """Return the state before the first step, a tree of arrays; None for a method without one."""
        return None

    def get_zero_above(self, times: Float[np.ndarray, " n"]) -> float | None:
        """Return the time above which the prediction is zero, and no model evaluated; None if there is none.

        Args:
          times: Times of all steps, from noise to data.
        """
        return None

    def check(self, branch_count: int) -> None:  # noqa: B027 (most combine any number)
        """Check that the method combines this number of predictions.

        Raises:
          UserError: If it combines fewer.
        """


@dataclass(frozen=True, kw_only=True)
class ClassifierFreeGuidance(GuidanceMethod):
    r"""Classifier-free guidance: the sum of differences $p_n + \sum_j w_j (p_{j-1} - p_j)$ of predictions $p_0 … p_n$.

    $p_0$ is under all conditions, $p_j$ without the first $j$, and $w_j$ the scale of condition $j$ (arXiv 2207.12598;
    2211.09800, section 3.2.1, for two conditions).
    """

    @staticmethod
    def combine(inputs: GuidanceInputs, params: Mapping[str, Any], state: Any) -> tuple[Values, Any]:
        p, scales = inputs.predictions, inputs.scales
        guided = p[1] + scales[0] * (p[0] - p[1])
        for scale, (before, after) in zip(scales[1:], itertools.pairwise(p[1:]), strict=True):
            guided = guided + (scale - 1) * (before - after)
        return guided, state


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjectedGuidance(GuidanceMethod):
    """Adaptive projected guidance: steps lose their part parallel to the predicted data (arXiv 2410.02416).

    The parallel part causes saturation. With `momentum`, each step is a running sum over sampling steps of the
    differences between predictions of the data, which is the state.

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
    -0.5) removes their common part. With it, guidance has one condition."""

    def __post_init__(self):
        if not math.isfinite(self.parallel_weight):
            raise UserError(f"parallel_weight={self.parallel_weight} is invalid: it must be finite. Use 0 to drop it.")
        if self.max_rms is not None and not 0 < self.max_rms < math.inf:
            raise UserError(f"max_rms={self.max_rms} is invalid: it must be positive. Use None for no limit.")
        if not -1 < self.momentum < 1:
            raise UserError(f"momentum={self.momentum} is invalid: it must lie between -1 and 1. Use 0 for none.")

    def get_params(self) -> dict[str, float | None]:
        return {**super().get_params(), "momentum": self.momentum or None}

    def init_state(self, noisy: Values) -> Values | None:
        return jnp.zeros_like(noisy) if self.momentum else None

    def check(self, branch_count: int) -> None:
        if self.momentum and branch_count > 2:
            raise UserError(
                f"momentum={self.momentum} is invalid with scales of several conditions: it sums the steps of one. Use "
                "momentum=0, or one scale."
            )

    @staticmethod
    def combine(inputs: GuidanceInputs, params: Mapping[str, Any], state: Any) -> tuple[Values, Any]:
        if params["momentum"] is not None and state is None:
            raise UserError(
                "a state without momentum is invalid: this guidance sums its steps. Use "
                "state=guidance.init_state(noise)."
            )
        guided, momentum = inputs.predictions[0], state
        for scale, (before, after) in zip(inputs.scales, itertools.pairwise(inputs.predictions), strict=True):
            step, momentum = _project(before - after, inputs, params, momentum)
            guided = guided + (scale - 1) * step
        return guided, momentum


def _project(
    step: Array, inputs: GuidanceInputs, params: Mapping[str, Any], momentum: Array | None
) -> tuple[Array, Array | None]:
    """Return the projected `step`, a difference of predictions, and the next momentum.

    A difference of predictions is a multiple of the difference of the data, so they have the same direction. At pure
    noise some predictions do not determine the data; the step is then used without momentum, and not kept.
    """
    process, prediction, time, mean = inputs.process, inputs.prediction, inputs.time, inputs.mean
    if process is None:
        raise UserError("process=None is invalid: projected guidance computes the predicted data. Use process=...")
    if momentum is not None:
        determinant = prediction.determinant(process, time)
        data_scale = jnp.where(jnp.abs(determinant) > MIN_ALPHA, process.sigma(time) / determinant, 0.0)
        momentum = data_scale * step + jnp.asarray(params["momentum"]) * momentum
        step = jnp.where(data_scale == 0, step, momentum / jnp.where(data_scale == 0, 1.0, data_scale))
    x = inputs.noisy / process.input_scale(time)
    data = Prediction.estimate(prediction, process, x, inputs.predictions[0], time).data  # of values alone
    parallel = mean(step * data) / jnp.maximum(mean(data * data), 1e-12)
    projected = step + (params["parallel_weight"] - 1) * parallel * data
    if params["max_rms"] is None:
        return projected, momentum
    rms = prediction.data_error_scale(process, time) * jnp.sqrt(mean(step * step))
    return jnp.minimum(1.0, params["max_rms"] / jnp.maximum(rms, 1e-12)) * projected, momentum


@dataclass(frozen=True, kw_only=True)
class ZeroStarGuidance(GuidanceMethod):
    r"""CFG-Zero*: an unconditional prediction of the best length, and first steps that change nothing.

    Guidance replaces the unconditional prediction $u$ by $s^\star u$. In each sample,
    $s^\star = \langle c, u \rangle / \lVert u \rVert^2$ brings it as close as possible to the conditional prediction
    $c$ (arXiv 2503.18886, section 4.1). The velocity of the first steps is zero, because a model's velocity is less
    accurate there than none (section 4.2). This is for models that predict velocities, and for one condition.

    Raises:
      UserError: If `zero_steps` is negative.
    """

    zero_steps: int = 1
    """Number of first steps, from pure noise on, whose velocity is zero; the paper sets it to 4 % of the steps."""

    def __post_init__(self):
        check_at_least(0, zero_steps=self.zero_steps)

    def get_params(self) -> dict[str, float | None]:
        return {}

    def get_zero_above(self, times: Float[np.ndarray, " n"]) -> float:
        """Return the time above which the velocity is zero.

        Raises:
          UserError: If no step is left after those with zero velocity.
        """
        if self.zero_steps >= len(times) - 1:
            rule = f"it must be below the number of steps, {len(times) - 1}. Use a smaller one, or more steps."
            raise UserError(f"zero_steps={self.zero_steps} is invalid: {rule}")
        return float(times[self.zero_steps])

    def check(self, branch_count: int) -> None:
        if branch_count > 2:
            raise UserError(
                "method=ZeroStarGuidance() is invalid with scales of several conditions: it changes the unconditional "
                "prediction. Use one scale, or method=ClassifierFreeGuidance()."
            )

    @staticmethod
    def combine(inputs: GuidanceInputs, params: Mapping[str, Any], state: Any) -> tuple[Values, Any]:
        c, u = inputs.predictions
        norm = inputs.mean(u * u)
        u = jnp.where(norm > 0, inputs.mean(c * u) / jnp.where(norm > 0, norm, 1.0), 0.0) * u
        return u + inputs.scales[0] * (c - u), state


GUIDANCE_METHODS: dict[str, GuidanceMethod] = {
    "apg": AdaptiveProjectedGuidance(),
    "cfg": ClassifierFreeGuidance(),
    "cfg-zero-star": ZeroStarGuidance(),
}
"""Methods that commands know by name; an installed package adds its own (see `dit_video.core.registry`)."""


def get_guidance_method(name: str) -> GuidanceMethod:
    """Return the method of guidance with this name.

    Raises:
      UserError: If no method has this name.
    """
    if (method := find_named(GUIDANCE_METHODS, name)) is None:
        raise UserError(f"guidance method {name!r} is unknown; use one of {', '.join(sorted(GUIDANCE_METHODS))}")
    return method
