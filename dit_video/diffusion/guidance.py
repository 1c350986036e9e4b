r"""Guidance: a `denoise` made of several.

With a model's prediction $c$ under the condition and $u$ without it, or under a negative prompt, classifier-free
guidance of scale $s$ is (arXiv 2207.12598)

$$g = u + s\,(c - u) = c + (s - 1)(c - u)$$

As predictions of one noisy value differ by multiples of what they say of the data, $g$ is the same whatever is
predicted. A third branch $b$, without the given image too, has a scale $s_i$ of its own (arXiv 2211.09800, eq. 3):

$$g = b + s_i\,(u - b) + s\,(c - u) = c + (s - 1)(c - u) + (s_i - 1)(u - b)$$

What is more acts on these sums: only at some times (`interval`), with the deviation of $c$ (`rescale`), or with steps
$c - u$ that keep away from $c$ itself (`Projected`). **What is taken over values is taken over those of one sample
alone**; which these are is said by `mean`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.core.typing import AnyArray
from dit_video.diffusion.predictions import Denoise, Prediction, Velocity
from dit_video.diffusion.processes.process import LEAST_ALPHA, Process

Branches = Callable[[Float[Array, "*shape"], Float[Array, "*time"]], Sequence[Float[Array, "*shape"]]]
"""`branches(noisy, time)`: the predictions with all conditions, without the prompt, and (of three) without any."""

Mean = Callable[[Float[Array, "*shape"]], Float[Array, "*means"]]
"""Each sample's mean over its own values, in a shape that broadcasts against them."""


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Adaptive projected guidance: steps lose their part along the prediction of the data (arXiv 2410.02416).

    That part is what saturates. With `momentum` the steps are a sum over sampling's own steps, of differences between
    predictions of the data; then the `denoise` has a past, and is sampled by `Remembering` solvers.

    Raises:
      UserError: a part that is no number, a largest step that is not positive, or a momentum of 1 or more.
    """

    parallel: float = 0.0
    """how much of the parallel part is kept, the paper's eta; 1 keeps it all"""
    largest: float | None = None
    """Root mean square over a sample of a step between predictions of the data; a longer one is shortened. The paper's
    r is that times the root of the number of values: its 15 for latents of 4 × 128 × 128 is 0.06."""
    momentum: float = 0.0
    """how much of the sum of earlier steps is added to each, the paper's beta: negative (-0.5, say), it takes away what
    they had in common"""

    def __post_init__(self):
        if not math.isfinite(self.parallel):
            raise UserError(f"parallel={self.parallel} of projected guidance must be a number; 0 drops that part")
        if self.largest is not None and not 0 < self.largest < math.inf:
            raise UserError(f"largest={self.largest} of projected guidance must be positive; leave it out for no limit")
        if not -1 < self.momentum < 1:
            raise UserError(f"momentum={self.momentum} of projected guidance lies between -1 and 1; 0 has no memory")


class Strength(NamedTuple):
    """The numbers of guidance, which a compiled program takes as arguments; None where something isn't asked for."""

    scale: Float[AnyArray, ""]
    image: Float[AnyArray, ""] | None = None
    interval: tuple[Float[AnyArray, ""], Float[AnyArray, ""]] | None = None
    rescale: Float[AnyArray, ""] | None = None
    parallel: Float[AnyArray, ""] | None = None
    largest: Float[AnyArray, ""] | None = None
    momentum: Float[AnyArray, ""] | None = None


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly conditions are followed, at the cost of variety.

    Raises:
      UserError: a scale below 0, times that are no interval in [0, 1], or a share that is none.
    """

    scale: float | tuple[float, float] = 2.0
    """of the prompt; 1 is none. Of two experts each may have its own, that of the noisy times first."""
    image: float | None = None
    """of what is given beside the prompt; None is 1, the model's own, and costs no third branch"""
    interval: tuple[float, float] | None = None
    """the times, both included, at which there is guidance at all; None is always (arXiv 2404.07724)"""
    rescale: float = 0.0
    """from 0 to 1: how far a guided prediction is brought to the standard deviation of the conditional one, which
    large scales exceed (arXiv 2305.08891, section 3.4, its phi)"""
    projected: Projected | None = None

    def __post_init__(self):
        scales = [*self.scales, *([] if self.image is None else [self.image])]
        if not all(0 <= scale < math.inf for scale in scales):
            raise UserError(
                f"scales of guidance are numbers from 0 on, 1 being none; got {', '.join(map(str, scales))}"
            )
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(f"the interval of guidance is two rising times in [0, 1], not {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale={self.rescale} of guidance must lie in [0, 1]; 0 leaves predictions as they are")
        if self.remembers and self.branches == 3:
            raise UserError("momentum is that of the prompt's guidance; leave out image= or momentum=")

    @property
    def scales(self) -> tuple[float, ...]:
        """One, or one for each of two experts."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    @property
    def remembers(self) -> bool:
        """Whether a step of sampling depends on those before; see `Remembering`."""
        return self.projected is not None and self.projected.momentum != 0 and self.branches > 1

    @property
    def branches(self) -> int:
        """How many predictions are made of one noisy value; a scale of 1 needs no second."""
        if self.image not in (None, 1.0):
            return 3
        return 1 if set(self.scales) == {1.0} else 2

    def strength(self, expert: int = 0) -> Strength:
        """The numbers of one expert."""
        scale = self.scales[min(expert, len(self.scales) - 1)]
        optional = {
            "image": self.image if self.branches == 3 else None,
            "rescale": self.rescale or None,
            "parallel": None if self.projected is None else self.projected.parallel,
            "largest": None if self.projected is None else self.projected.largest,
            "momentum": self.projected.momentum if self.projected is not None and self.remembers else None,
        }
        ends = None if self.interval is None else (_number(self.interval[0]), _number(self.interval[1]))
        numbers = {name: None if value is None else _number(value) for name, value in optional.items()}
        return Strength(_number(scale), interval=ends, **numbers)


def _number(value: float) -> Float32[np.ndarray, ""]:
    return np.asarray(value, np.float32)


def classifier_free(conditional: Denoise, unconditional: Denoise, scale: Float[Array, ""] | float) -> Denoise:
    """`u + scale * (c - u)`, each branch evaluated by itself; scale 1 is the conditional model."""
    return guided(apart(conditional, unconditional), Strength(jnp.asarray(scale)))


def apart(*branches: Denoise) -> Branches:
    """Each branch by itself, one after the other."""
    return lambda noisy, time: [denoise(noisy, time) for denoise in branches]


def batched(denoise: Denoise, count: int) -> Branches:
    """All branches in one evaluation: `denoise` takes them one after the other along the first axis."""

    def branches(noisy, time):
        times = jnp.concatenate([time] * count) if jnp.ndim(time) else time
        return jnp.split(denoise(jnp.concatenate([noisy] * count), times), count)

    return branches


def mean_of_each(values: Float[Array, "B *shape"]) -> Float[Array, "B *ones"]:
    """The mean over all axes but the first."""
    return values.mean(axis=tuple(range(1, values.ndim)), keepdims=True)


def guided(
    branches: Branches,
    strength: Strength,
    *,
    conditional: Denoise | None = None,
    mean: Mean = mean_of_each,
    process: Process | None = None,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
) -> Denoise:
    """Guidance of a model as a `denoise`; with momentum, as a `denoise(noisy, time, past)` for `Remembering` solvers.

    Args:
      branches: the predictions that are combined.
      strength: how.
      conditional: the first branch alone, which is all that is evaluated outside the interval; time is a scalar then.
        Without it all branches are evaluated at all times.
      mean: over each sample's own values.
      process: which projected guidance needs, to know the data that a prediction stands for.
      prediction: what the model predicts, likewise.

    Raises:
      UserError: projected guidance without a process; when it is called, momentum without a past.
    """
    projection = None
    if strength.parallel is not None:
        if process is None:
            raise UserError("projected guidance is of predictions of the data; say of which process they are")
        projection = _Projection(process, prediction, mean, strength.parallel, strength.largest, strength.momentum)

    def combined(noisy, time, past):
        predictions = branches(noisy, time)
        values = [prediction.values(predicted) for predicted in predictions]
        beside = predictions[0][..., values[0].shape[-1] :]  # a variance, which is not guided
        found, kept = _combined(values, strength, noisy, time, projection, mean, past)
        whole = jnp.concatenate([found, beside], axis=-1) if beside.size else found
        return (whole, kept), (predictions[0], past)

    def chosen(noisy, time, past):
        if strength.interval is None:
            return combined(noisy, time, past)[0]
        inside = (strength.interval[0] <= time) & (time <= strength.interval[1])
        if conditional is None:
            pairs = combined(noisy, time, past)
            return jax.tree.map(lambda *pair: jnp.where(inside, *pair), *pairs)
        return jax.lax.cond(inside, lambda: combined(noisy, time, past)[0], lambda: (conditional(noisy, time), past))

    def denoise(noisy, time, *past):
        if strength.momentum is None:
            return chosen(noisy, time, None)[0]
        if not past:
            raise UserError("guidance with momentum has a past; sample it with Remembering(solver=...)")
        return chosen(noisy, time, *past)

    return denoise


class _Projection(NamedTuple):
    process: Process
    prediction: Prediction
    mean: Mean
    parallel: AnyArray
    largest: AnyArray | None
    momentum: AnyArray | None

    def __call__(
        self, step: Array, predicted: Array, noisy: Array, time: Array, past: Array | None
    ) -> tuple[Array, Array | None]:
        """A difference of predictions, which is one of the data times a number: directions are the same.

        With the past comes that of the next step. Of pure noise some predictions say nothing of the data: there the
        difference is all there is, and isn't remembered.
        """
        if past is not None and self.momentum is not None:
            determinant = self.prediction.determinant(self.process, time)
            of_data = jnp.where(jnp.abs(determinant) > LEAST_ALPHA, self.process.sigma(time) / determinant, 0.0)
            past = of_data * step + jnp.asarray(self.momentum) * past
            step = jnp.where(of_data == 0, step, past / jnp.where(of_data == 0, 1.0, of_data))
        x = noisy / self.process.input_scale(time)
        data = Prediction.estimate(self.prediction, self.process, x, predicted, time).data  # of values alone
        along = self.mean(step * data) / jnp.maximum(self.mean(data * data), 1e-12)
        changed = step + (self.parallel - 1) * along * data
        if self.largest is None:
            return changed, past
        length = self.prediction.data_error(self.process, time) * jnp.sqrt(self.mean(step * step))
        return jnp.minimum(1.0, self.largest / jnp.maximum(length, 1e-12)) * changed, past


def _combined(
    predictions: Sequence[Array],
    strength: Strength,
    noisy: Array,
    time: Array,
    projection: _Projection | None,
    mean: Mean,
    past: Array | None,
) -> tuple[Array, Array | None]:
    """The equations of the module's docstring, and the past of the next step."""
    c, u = predictions[:2]
    if projection is None:
        found = u + strength.scale * (c - u)
    else:
        step, past = projection(c - u, c, noisy, time, past)
        found = c + (strength.scale - 1) * step
    if strength.image is not None:
        step = u - predictions[2]
        found = found + (strength.image - 1) * (
            step if projection is None else projection(step, c, noisy, time, None)[0]
        )
    if strength.rescale is not None:
        deviation = _deviation(found, mean)
        ratio = jnp.where(deviation > 0, _deviation(c, mean) / jnp.where(deviation > 0, deviation, 1.0), 1.0)
        found = found * (strength.rescale * ratio + 1 - strength.rescale)
    return found, past


def _deviation(values: Array, mean: Mean) -> Array:
    return jnp.sqrt(mean(jnp.square(values - mean(values))))
