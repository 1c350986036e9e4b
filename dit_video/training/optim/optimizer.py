"""Optimizers from configs."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, PyTree

from dit_video.core.errors import UserError
from dit_video.core.trees import closest, flatten, map_with_path
from dit_video.training.optim.muon import scale_by_muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, Adafactor, Muon or schedule-free AdamW with warmup, a schedule and global clipping, of all parameters or
    of some.

    Adafactor (arXiv 1804.04235) keeps of a matrix's second moments the means of rows and columns alone, no momentum,
    and clips the root mean square of an array's update at 1 (in learning rates, which are absolute: of AdamW's size).

    Muon orthogonalises the updates of `matrices` and of convolutions, and brings them to one root mean square, by
    default about that of AdamW (arXiv 2502.16982, eq. 4); all other parameters get AdamW with Nesterov momentum at the
    same learning rate.

    `schedule_free` (arXiv 2405.15682) takes the gradient between where AdamW without momentum stands and the average
    of where it stood, a share `b1` of the way to the average. That average is what is evaluated and sampled from: it
    takes the place of the first moving average, and further ones are of it.

    Raises:
      UserError: values out of range, or patterns that are no regular expressions.
    """

    kind: Literal["adamw", "adafactor", "muon", "schedule_free"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """after the warmup; `wsd` is constant and falls linearly to zero over the last fifth of the run"""
    warmup: int = 100
    matrix_scale: float = 0.2
    """root mean square of Muon's update of a matrix, in learning rates"""
    matrices: tuple[str, ...] = ("blocks/",)
    """Regular expressions, found anywhere in the paths of the linear maps whose kernels are Muon's. Those of
    convolutions always are."""
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip: float = 1.0
    trainable: tuple[str, ...] = ()
    """Regular expressions, found anywhere in the paths of the parameters that are trained; without any all are."""
    frozen: tuple[str, ...] = ()
    """and of those that are not"""

    def __post_init__(self):
        if not self.learning_rate > 0 or self.warmup < 0:
            raise UserError(
                f"an optimizer needs a positive learning rate and no negative warmup; got learning_rate="
                f"{self.learning_rate}, warmup={self.warmup}"
            )
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.weight_decay >= 0 and self.clip > 0):
            raise UserError(
                f"an optimizer needs b1 and b2 in [0, 1), weight_decay >= 0 and clip > 0; got b1={self.b1}, "
                f"b2={self.b2}, weight_decay={self.weight_decay}, clip={self.clip}"
            )
        if self.kind == "schedule_free" and (self.schedule != "constant" or self.b1 == 0):
            raise UserError(
                "a schedule-free optimizer averages instead of lowering its learning rate: use schedule='constant', "
                f"and a positive b1, not {self.schedule!r} and b1={self.b1}"
            )
        for pattern in (*self.trainable, *self.frozen, *self.matrices):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is no regular expression for parameter paths: {error}") from error

    def trains(self, path: str) -> bool:
        """Whether the parameter of this path is trained."""
        chosen = not self.trainable or any(re.search(pattern, path) for pattern in self.trainable)
        return chosen and not any(re.search(pattern, path) for pattern in self.frozen)


def learning_rates(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """The learning rate of each of `steps` steps.

    Raises:
      UserError: a run that is not longer than its warmup.
    """
    if steps <= config.warmup:
        raise UserError(f"a run of {steps} steps is not longer than its warmup of {config.warmup}; shorten the warmup")
    peak, rest = config.learning_rate, steps - config.warmup
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(peak)
        case "cosine":
            main = optax.cosine_decay_schedule(peak, rest)
        case "wsd":
            decay = max(1, min(steps // 5, rest))
            main = optax.linear_schedule(peak, 0.0, decay, transition_begin=rest - decay)
    warmup = optax.linear_schedule(peak / max(1, config.warmup), peak, max(1, config.warmup))
    return optax.join_schedules([warmup, main], [config.warmup])


def make_optimizer(config: OptimizerConfig, *, steps: int, begin: int = 0) -> optax.GradientTransformation:
    """The optax transformation of a config, for `steps` steps.

    Args:
      config: of the optimizer.
      steps: that the schedule of learning rates is for.
      begin: updates that the optimizer's state counts before them: those of earlier stages.

    Raises:
      UserError: a run that is not longer than its warmup; at its `init`, a trainable or frozen path that no parameter
        has.
    """
    own = learning_rates(config, steps=steps)
    rates: optax.Schedule = lambda count: own(count - begin)  # noqa: E731
    match config.kind:
        case "adamw":
            main = _adamw(config, rates)
        case "adafactor":
            main = _adafactor(config, rates)
        case "schedule_free":
            main = _schedule_free(config, rates)
        case "muon":
            main = optax.partition(
                {"matrix": _muon(config, rates), "other": _adamw(config, rates, nesterov=True)},
                functools.partial(_matrices, config.matrices),
            )
    chain = optax.chain(optax.clip_by_global_norm(config.clip), main)
    if not (config.trainable or config.frozen):
        return chain
    return optax.partition({"train": chain, "frozen": _STILL}, lambda params: _labels(config, params))


def _adamw(config: OptimizerConfig, rates: optax.Schedule, *, nesterov: bool = False) -> optax.GradientTransformation:
    return optax.adamw(rates, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, nesterov=nesterov)


def _adafactor(config: OptimizerConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rates),
    )


def _schedule_free(config: OptimizerConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    base = optax.chain(
        optax.scale_by_rms(config.b2, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rates),
    )
    # It counts its steps from 1.
    return optax.contrib.schedule_free(base, lambda step: rates(step - 1), b1=config.b1)


def own_average(params: PyTree, opt_state: PyTree) -> PyTree | None:
    """The parameters to be evaluated, where an optimizer averages them itself; None where it does not."""

    def averages(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    found = [node for node in jax.tree.leaves(opt_state, is_leaf=averages) if averages(node)]
    if not found:
        return None
    b1, moved = found[0].b1, flatten(found[0].z)  # which has no leaf for a parameter that is frozen

    def average(path: str, leaf: Array) -> Array:
        return (leaf - (1 - b1) * moved[path]) / b1 if path in moved else leaf

    return map_with_path(average, params)


def _muon(config: OptimizerConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_muon(config.matrix_scale),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rates),
    )


def hold_still(config: OptimizerConfig, params: PyTree) -> PyTree:
    """Parameters for a loss that is constant in those that are not trained: no gradients of them are computed."""
    return map_with_path(lambda path, leaf: leaf if config.trains(path) else jax.lax.stop_gradient(leaf), params)


# Not 0: a parameter of -0 would become 0.
_STILL = optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates))


def _labels(config: OptimizerConfig, params: PyTree) -> PyTree:
    """`frozen` or `train` for every parameter."""
    paths = list(flatten(params))
    for kind, patterns in (("trainable", config.trainable), ("frozen", config.frozen)):
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in paths):
                raise UserError(f"{kind} path {pattern!r} is no parameter's; close are {closest(pattern, paths)}")
    return map_with_path(lambda path, _: "train" if config.trains(path) else "frozen", params)


def _matrices(patterns: Sequence[str], params: PyTree) -> PyTree:
    """`matrix` for every parameter that Muon updates, as `scale_by_muon` sees it, or `other`."""

    def choose(path: str, leaf: Array) -> str:
        linear = leaf.ndim in (2, 3) and any(re.search(pattern, path) for pattern in patterns)
        return "matrix" if path.endswith("kernel") and (linear or leaf.ndim == 5) else "other"

    return map_with_path(choose, params)
