"""Optimizers from a config: which parameters are trained, at which rates, and by which rule."""

import abc
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Array, PyTree

from dit_video.core.errors import UserError
from dit_video.core.trees import check_path_patterns, check_patterns, flatten, map_with_path
from dit_video.distributed.mesh import AnyMesh
from dit_video.training.optim.muon import scale_by_muon
from dit_video.training.optim.schedules import Constant, Schedule


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(abc.ABC):
    """Configuration of an optimizer, with its learning rate, weight decay, gradient clipping and trained parameters.

    One of another package is a registered subclass with a `make_main` of its own, of any optax transformation. Patterns
    are regular expressions that are searched in parameter paths, such as `backbone/blocks/attention/query/kernel`; one
    that matches no parameter is an error.

    Raises:
      UserError: If a value is out of range, or if patterns are a string, or not regular expressions.
    """

    learning_rate: float = 1e-4
    """Peak of the learning rate."""
    schedule: Schedule = field(default_factory=Constant)
    rate_factors: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Factors of the learning rate by pattern, such as `{"^text/": 0.1}`; a parameter has the product of those that
    match it."""
    weight_decay: float = 0.0
    """Decay of the selected parameters in each step, relative to the learning rate."""
    weight_decay_patterns: tuple[str, ...] = (r"kernel(/[ab])?$",)
    """Patterns of the parameters that decay: by default the kernels of linear layers and convolutions, and the factors
    of their adapters, but not biases, norms, tables, embeddings and codebooks, which decay would pull away from what
    they have to be."""
    max_grad_norm: float = 1.0
    """Largest global norm of the gradients; larger gradients are scaled down to it."""
    trainable: tuple[str, ...] = ()
    """Patterns of the parameters to train; all if empty."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters not to train, even if they are `trainable`."""
    state_fields: ClassVar[tuple[str, ...]] = ("trainable", "frozen")
    """Fields that the structure of the optimizer's state depends on."""

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate={self.learning_rate} is invalid: it must be positive and finite. Use 1e-4.")
        if not (0 <= self.weight_decay < math.inf and self.max_grad_norm > 0):
            raise UserError(
                f"weight_decay={self.weight_decay}, max_grad_norm={self.max_grad_norm} is invalid: weight_decay must "
                "be finite and not negative, and max_grad_norm positive. Use 0.01 and 1.0."
            )
        for pattern, factor in self.rate_factors.items():
            if not 0 <= factor < math.inf:
                raise UserError(
                    f"rate_factors={dict(self.rate_factors)} is invalid: the factor of {pattern!r} must not be "
                    "negative, and be finite. Use frozen for parameters that are not trained."
                )
        names = ("trainable", "frozen", "rate_factors", "weight_decay_patterns")
        check_patterns(**{name: getattr(self, name) for name in names})

    def is_trained(self, path: str) -> bool:
        """Return True if the parameter with this path is trained."""
        return (not self.trainable or _matches(self.trainable, path)) and not _matches(self.frozen, path)

    def make_schedule(self, *, steps: int) -> optax.Schedule:
        """Return the learning rate after each number of updates of a training of `steps` steps.

        Raises:
          UserError: If the training is not longer than its warmup.
        """
        return self.schedule.make(self.learning_rate, steps=steps)

    def make(self, *, steps: int, start_step: int = 0, mesh: AnyMesh | None = None) -> optax.GradientTransformation:
        """Return the transformation from gradients to updates.

        Args:
          steps: Length of the learning rate schedule.
          start_step: Number of updates before the schedule begins: the updates of earlier stages.
          mesh: Mesh of the parameters; None for a single device.

        Raises:
          UserError: If the training is not longer than its warmup; or, raised by `init`, if a pattern matches no
            parameter.
        """
        schedule = self.make_schedule(steps=steps)
        rates: optax.Schedule = lambda count: schedule(count - start_step)  # noqa: E731
        main = optax.chain(optax.clip_by_global_norm(self.max_grad_norm), self.make_main(rates, mesh=mesh))
        if self.trainable or self.frozen:
            main = optax.partition({"train": main, "frozen": _SET_TO_ZERO}, functools.partial(_label_trained, self))

        def init(params: PyTree) -> Any:
            self.check_paths(flatten(params))
            return main.init(params)

        return optax.GradientTransformationExtraArgs(init, optax.with_extra_args_support(main).update)

    def check_paths(self, params: Mapping[str, Any]) -> None:
        """Check that every pattern that is used matches a parameter, given by path.

        Raises:
          UserError: If a pattern matches none.
        """
        check_path_patterns("trainable", self.trainable, params)
        check_path_patterns("frozen", self.frozen, params)
        check_path_patterns("rate_factors", tuple(self.rate_factors), params)
        if self.weight_decay > 0:
            check_path_patterns("weight_decay_patterns", self.weight_decay_patterns, params)

    @abc.abstractmethod
    def make_main(self, rates: optax.Schedule, *, mesh: AnyMesh | None) -> optax.GradientTransformation:
        """Return the transformation from clipped gradients to updates, which ends with `decay_and_scale(rates)`."""

    def decay_and_scale(self, rates: optax.Schedule) -> list[optax.GradientTransformation]:
        """Return the last transformations of an optimizer: weight decay, then the learning rate and its factors."""
        is_decayed = functools.partial(map_with_path, lambda path, _: _matches(self.weight_decay_patterns, path))
        # An array, as optax would leave a Python 0 out: programs, and so the last bits, do not depend on the value.
        decay = optax.add_decayed_weights(np.float32(self.weight_decay), mask=is_decayed)
        transformations = [decay, optax.scale_by_learning_rate(rates)]
        if self.rate_factors:
            transformations.append(_scale_by_path(self.rate_factors))
        return transformations


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """AdamW (arXiv 1711.05101).

    Raises:
      UserError: If a value is out of range.
    """

    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.b1, self.b2)

    def make_main(self, rates: optax.Schedule, *, mesh: AnyMesh | None) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(b1=self.b1, b2=self.b2), *self.decay_and_scale(rates))


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerConfig):
    """Adafactor (arXiv 1804.04235), which keeps the row and column means of a matrix's second moments, and no momentum.

    The root mean square of an array's update is clipped at 1, times the learning rate, which is absolute, as for AdamW.
    """

    def make_main(self, rates: optax.Schedule, *, mesh: AnyMesh | None) -> optax.GradientTransformation:
        factored = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
        return optax.chain(*factored, *self.decay_and_scale(rates))


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Muon, which orthogonalizes the updates of selected kernels and of convolutions.

    It scales them to a common root mean square, by default about that of AdamW (arXiv 2502.16982, eq. 4). All other
    parameters use AdamW with Nesterov momentum at the same learning rate.

    Raises:
      UserError: If a value is out of range, or if patterns are a string, or not regular expressions.
    """

    rms: float = 0.2
    """Root mean square of the update of a matrix, relative to the learning rate."""
    patterns: tuple[str, ...] = ("blocks/",)
    """Patterns of the linear kernels that Muon updates. It always updates kernels of convolutions; in a model that has
    some, the default may match no linear kernel."""
    b1: float = 0.9
    b2: float = 0.99
    state_fields: ClassVar[tuple[str, ...]] = ("patterns", *OptimizerConfig.state_fields)

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.b1, self.b2)
        check_patterns(patterns=self.patterns)

    def check_paths(self, params: Mapping[str, Any]) -> None:
        super().check_paths(params)
        kernels = [path for path, leaf in params.items() if _is_linear(path, leaf)]
        is_optional = self.patterns == Muon.patterns and any(_is_convolution(*item) for item in params.items())
        if kernels and not is_optional:
            check_path_patterns("patterns", self.patterns, kernels)

    def make_main(self, rates: optax.Schedule, *, mesh: AnyMesh | None) -> optax.GradientTransformation:
        muon = optax.chain(scale_by_muon(self.rms, mesh=mesh), *self.decay_and_scale(rates))
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, nesterov=True)
        return optax.partition(
            {"matrix": muon, "other": optax.chain(adam, *self.decay_and_scale(rates))},
            functools.partial(_label_matrices, self.patterns),
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(OptimizerConfig):
    """Schedule-free AdamW (arXiv 2405.15682), which averages instead of lowering its learning rate.

    Gradients are computed at an interpolation, with weight `b1` of the average, between the iterate of AdamW without
    momentum and the average of the iterates. The average is evaluated and sampled from: it replaces the first moving
    average, and further averages are computed from it.

    Raises:
      UserError: If a value is out of range, or if the schedule is not constant.
    """

    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        _check_betas(self.b1, self.b2)
        if self.b1 == 0 or not isinstance(self.schedule, Constant):
            raise UserError(
                f"schedule={self.schedule}, b1={self.b1} is invalid: schedule-free AdamW averages instead of lowering "
                "its learning rate. Use Constant(...) and a positive b1."
            )

    def make_main(self, rates: optax.Schedule, *, mesh: AnyMesh | None) -> optax.GradientTransformation:
        rms = optax.scale_by_rms(self.b2, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
        base = optax.chain(rms, *self.decay_and_scale(rates))
        # optax.contrib.schedule_free counts its steps from 1.
        return optax.contrib.schedule_free(base, lambda step: rates(step - 1), b1=self.b1)


def _check_betas(b1: float, b2: float) -> None:
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise UserError(f"b1={b1}, b2={b2} is invalid: they must lie in [0, 1). Use 0.9 and 0.99.")


def _scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Return the product of updates with the factors of their paths."""

    def scale(path: str, update: Array) -> Array:
        for pattern, factor in factors.items():
            update = update * factor if re.search(pattern, path) else update
        return update

    return optax.stateless(lambda updates, _: map_with_path(scale, updates))


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
        is_selected = _is_linear(path, leaf) and _matches(patterns, path)
        return "matrix" if is_selected or _is_convolution(path, leaf) else "other"

    return map_with_path(choose, params)


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def _is_linear(path: str, leaf: Array | jax.ShapeDtypeStruct) -> bool:
    """Return True for the kernel of a linear layer, or of a stack of them."""
    return path.endswith("kernel") and leaf.ndim in (2, 3)


def _is_convolution(path: str, leaf: Array | jax.ShapeDtypeStruct) -> bool:
    return path.endswith("kernel") and leaf.ndim == 5
