"""Optimizers and learning rate schedules from a config."""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, PyTree

from dit_video.core.errors import UserError
from dit_video.core.trees import check_path_patterns, flatten, map_with_path
from dit_video.distributed.mesh import AnyMesh
from dit_video.training.optim.muon import scale_by_muon


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Configuration of AdamW, Adafactor, Muon or schedule-free AdamW with warmup, schedule and gradient clipping.

    Adafactor (arXiv 1804.04235) keeps only the row and column means of a matrix's second moments and no momentum. The
    root mean square of an array's update is clipped at 1 (times the learning rate, which is absolute, as for AdamW).

    Muon orthogonalizes the updates of the kernels selected by `muon_patterns` and of convolutions, and scales them to a
    common root mean square, by default about that of AdamW (arXiv 2502.16982, eq. 4). All other parameters use AdamW
    with Nesterov momentum at the same learning rate.

    `schedule_free` (arXiv 2405.15682) computes gradients at an interpolation, with weight `b1` of the average, between
    the iterate of AdamW without momentum and the average of the iterates. The average is evaluated and sampled from: it
    replaces the first moving average, and further averages are computed from it.

    Raises:
      UserError: If a value is out of range, or if a pattern is not a regular expression.
    """

    kind: Literal["adamw", "adafactor", "muon", "schedule_free"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """Schedule after the warmup; `wsd` is constant, then falls linearly to zero over the last fifth of the run."""
    warmup: int = 100
    """Number of steps of linear warmup."""
    muon_rms: float = 0.2
    """Root mean square of Muon's update of a matrix, relative to the learning rate."""
    muon_patterns: tuple[str, ...] = ("blocks/",)
    """Regular expressions, searched in the paths of linear kernels, that select those updated by Muon. Kernels of
    convolutions always are."""
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    """Decay of the selected parameters in each step, relative to the learning rate."""
    weight_decay_patterns: tuple[str, ...] = (r"kernel(/[ab])?$",)
    """Regular expressions, searched in parameter paths, that select the parameters that decay: by default the kernels
    of linear layers and convolutions, and the factors of their adapters, but not biases, norms, tables, embeddings and
    codebooks, which decay would pull away from what they have to be."""
    max_grad_norm: float = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down to it."""
    trainable: tuple[str, ...] = ()
    """Regular expressions, searched in parameter paths, that select the parameters to train; all if empty."""
    frozen: tuple[str, ...] = ()
    """Regular expressions that select parameters not to train, even if they are `trainable`."""

    def __post_init__(self):
        if not self.learning_rate > 0 or self.warmup < 0:
            rule = "the learning rate must be positive, and the warmup not negative."
            raise UserError(f"learning_rate={self.learning_rate}, warmup={self.warmup} is invalid: {rule}")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.weight_decay >= 0 and self.max_grad_norm > 0):
            raise UserError(
                f"b1={self.b1}, b2={self.b2}, weight_decay={self.weight_decay}, max_grad_norm={self.max_grad_norm} "
                "is invalid: b1 and b2 must lie in [0, 1), with weight_decay >= 0 and max_grad_norm > 0."
            )
        if self.kind == "schedule_free" and (self.schedule != "constant" or self.b1 == 0):
            raise UserError(
                f"schedule={self.schedule!r}, b1={self.b1} is invalid for kind='schedule_free', which averages instead "
                "of lowering its learning rate. Use schedule='constant' and a positive b1."
            )
        for pattern in (
            *self.trainable,
            *self.frozen,
            *self.muon_patterns,
            *self.weight_decay_patterns,
        ):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression for parameter paths: {error}") from error

    def is_trained(self, path: str) -> bool:
        """Return True if the parameter with this path is trained."""
        is_selected = not self.trainable or any(re.search(pattern, path) for pattern in self.trainable)
        return is_selected and not any(re.search(pattern, path) for pattern in self.frozen)


def make_learning_rate_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Return the learning rate schedule of a run of `steps` steps.

    Raises:
      UserError: If the run is not longer than its warmup.
    """
    if steps <= config.warmup:
        raise UserError(f"warmup={config.warmup} is invalid: it must be below steps={steps}. Use a shorter warmup.")
    peak, decay_steps = config.learning_rate, steps - config.warmup
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(peak)
        case "cosine":
            main = optax.cosine_decay_schedule(peak, decay_steps)
        case "wsd":
            cooldown = max(1, min(steps // 5, decay_steps))
            main = optax.linear_schedule(peak, 0.0, cooldown, transition_begin=decay_steps - cooldown)
    warmup = optax.linear_schedule(peak / max(1, config.warmup), peak, max(1, config.warmup))
    return optax.join_schedules([warmup, main], [config.warmup])


def make_optimizer(
    config: OptimizerConfig, *, steps: int, start_step: int = 0, mesh: AnyMesh | None = None
) -> optax.GradientTransformation:
    """Return the optax transformation of a config, for `steps` steps.

    Args:
      config: Configuration of the optimizer.
      steps: Length of the learning rate schedule.
      start_step: Number of updates before the schedule begins: the updates of earlier stages.
      mesh: Mesh over whose devices Muon divides its matrices; None for a single device.

    Raises:
      UserError: If the run is not longer than its warmup; or, raised by `init`, if a pattern that is used matches no
        parameter.
    """
    schedule = make_learning_rate_schedule(config, steps=steps)
    rates: optax.Schedule = lambda count: schedule(count - start_step)  # noqa: E731
    match config.kind:
        case "adamw":
            main = _adamw(config, rates)
        case "adafactor":
            factored = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
            main = optax.chain(*factored, *_decay_and_scale(config, rates))
        case "schedule_free":
            main = _schedule_free(config, rates)
        case "muon":
            muon = optax.chain(scale_by_muon(config.muon_rms, mesh=mesh), *_decay_and_scale(config, rates))
            main = optax.partition(
                {"matrix": muon, "other": _adamw(config, rates, nesterov=True)},
                functools.partial(_label_matrices, config.muon_patterns),
            )
    chain: optax.GradientTransformation = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), main)
    if config.trainable or config.frozen:
        chain = optax.partition({"train": chain, "frozen": _SET_TO_ZERO}, lambda params: _label_trained(config, params))

    def init(params: PyTree) -> optax.OptState:
        check_optimizer_patterns(config, flatten(params))
        return chain.init(params)

    return chain._replace(init=init)


def check_optimizer_patterns(config: OptimizerConfig, params: Mapping[str, Any]) -> None:
    """Check that every pattern that the optimizer uses matches a parameter, given by path.

    Raises:
      UserError: If a pattern matches none, or one for Muon no kernel of a linear layer, of which there are some.
    """
    check_path_patterns("trainable", config.trainable, params)
    check_path_patterns("frozen", config.frozen, params)
    if config.kind == "muon" and (kernels := [path for path, leaf in params.items() if _is_linear(path, leaf)]):
        check_path_patterns("muon_patterns", config.muon_patterns, kernels)
    if config.weight_decay > 0:
        check_path_patterns("weight_decay_patterns", config.weight_decay_patterns, params)


def _is_linear(path: str, leaf: Array) -> bool:
    """Return True for the kernel of a linear layer, or of a stack of them."""
    return path.endswith("kernel") and leaf.ndim in (2, 3)


def _adamw(config: OptimizerConfig, rates: optax.Schedule, *, nesterov: bool = False) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, nesterov=nesterov)
    return optax.chain(adam, *_decay_and_scale(config, rates))


def _decay_and_scale(config: OptimizerConfig, rates: optax.Schedule) -> list[optax.GradientTransformation]:
    """Return the last two transformations of an optimizer: weight decay, then the learning rate."""
    return [_decay_weights(config), optax.scale_by_learning_rate(rates)]


def _decay_weights(config: OptimizerConfig) -> optax.GradientTransformation:
    """Return the weight decay of the selected parameters.

    It has the state of `optax.add_decayed_weights` without a mask, so that checkpoints without patterns can be read.
    """

    def decay(updates: PyTree, params: PyTree) -> PyTree:
        params_by_path = flatten(params)

        def add(path: str, update: Array) -> Array:
            is_decayed = any(re.search(pattern, path) for pattern in config.weight_decay_patterns)
            return update + config.weight_decay * params_by_path[path] if is_decayed else update

        return map_with_path(add, updates)

    return optax.stateless(decay)


def _schedule_free(config: OptimizerConfig, rates: optax.Schedule) -> optax.GradientTransformation:
    rms = optax.scale_by_rms(config.b2, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
    base = optax.chain(rms, *_decay_and_scale(config, rates))
    # optax.contrib.schedule_free counts its steps from 1.
    return optax.contrib.schedule_free(base, lambda step: rates(step - 1), b1=config.b1)


def get_schedule_free_average(params: PyTree, opt_state: PyTree) -> PyTree | None:
    """Return the average of the parameters kept by a schedule-free optimizer; None for other optimizers."""

    def is_schedule_free(node: Any) -> bool:
        return isinstance(node, optax.contrib.ScheduleFreeState)

    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_schedule_free) if is_schedule_free(node)]
    if not states:
        return None
    b1, iterates = states[0].b1, flatten(states[0].z)  # frozen parameters have no leaf

    def average(path: str, leaf: Array) -> Array:
        return (leaf - (1 - b1) * iterates[path]) / b1 if path in iterates else leaf

    return map_with_path(average, params)


def freeze(config: OptimizerConfig, params: PyTree) -> PyTree:
    """Stop the gradients at parameters that are not trained, so that none are computed for them."""
    return map_with_path(lambda path, leaf: leaf if config.is_trained(path) else jax.lax.stop_gradient(leaf), params)


# The update is -0 rather than 0, because -0 + 0 would turn a parameter of -0 into 0.
_SET_TO_ZERO = optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates))


def _label_trained(config: OptimizerConfig, params: PyTree) -> PyTree:
    """Return the label `frozen` or `train` of each parameter."""
    return map_with_path(lambda path, _: "train" if config.is_trained(path) else "frozen", params)


def _label_matrices(patterns: Sequence[str], params: PyTree) -> PyTree:
    """Return the label `matrix` of each parameter that Muon updates, and `other` of the rest."""

    def choose(path: str, leaf: Array) -> str:
        is_selected = _is_linear(path, leaf) and any(re.search(pattern, path) for pattern in patterns)
        return "matrix" if is_selected or (path.endswith("kernel") and leaf.ndim == 5) else "other"

    return map_with_path(choose, params)
