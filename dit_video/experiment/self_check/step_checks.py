"""Checks of steps: each update recomputed from a few values of the states before and after it.

The gradient that an optimizer received follows from its first moments, $g = (m' - b_1 m) / (1 - b_1)$. It is compared
with the gradient of the loss; second moments, parameters and averages with the equations that they follow. The initial
weights are read from their files a second time.
"""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from dit_video.core.files import read_json, write_json
from dit_video.core.trees import flatten, map_with_path
from dit_video.distributed import shard_batch
from dit_video.experiment.initial_weights import get_kernel_dtype, read_initial_denoiser
from dit_video.experiment.self_check.subject import CheckedTraining, Problem
from dit_video.tokens import PackedBatch
from dit_video.training.losses.auxiliary import split_heads
from dit_video.training.optim.muon import MuonState
from dit_video.training.optim.optimizer import AdamW, Muon, OptimizerConfig, ScheduleFreeAdamW
from dit_video.training.optim.schedules import Constant, Cosine, WarmupStableDecay
from dit_video.weights.parameter import Parameter

StateValues = Mapping[str, Mapping[str, np.ndarray]]
"""Values of parameters by kind and path, in float64: "params", "ema", and "mu" and "nu" where the optimizer has them;
"count" holds the number of updates of each parameter's moments."""
COUNT = 64
"""Number of values of each array."""


class ValueReader:
    """Reads values at the same random places of every array of a kind."""

    def __init__(self, subject: CheckedTraining, params: Any):
        self._subject = subject
        generator = subject.make_generator("values")
        self.shapes = {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}
        """Shapes of the arrays, by path."""
        self._places = {
            path: tuple(generator.integers(size, size=COUNT) for size in shape) for path, shape in self.shapes.items()
        }
        self._take = subject.jit(self._take_values)
        self._take_params = subject.jit(self.take)

    def read_later(self, state: Any) -> Any:
        """Return values of a state as arrays on the devices, which need not be finished."""
        moments = find_moments(state.opt_state)
        return self._take({"params": flatten(state.params), "ema": flatten(state.ema), **moments})

    def read(self, state: Any) -> StateValues:
        """Return values of a state."""
        return to_state_values(self.read_later(state))

    def take(self, tree: Any) -> dict[str, Array]:
        """Return the values of a tree of parameters or gradients. Traceable."""
        return {path: leaf[self._places[path]] for path, leaf in flatten(tree).items()}

    def take_from(self, path: str, array: np.ndarray) -> np.ndarray:
        """Return the values of one parameter, whose array has the same shape."""
        return array[self._places[path]]

    def read_values(self, params: Any) -> dict[str, np.ndarray]:
        """Return values of parameters."""
        return {path: np.asarray(each, np.float64) for path, each in jax.device_get(self._take_params(params)).items()}

    def scatter(self, like: Any, values: Mapping[str, Array]) -> Any:
        """Return a tree of zeros with these values at the places. Traceable."""
        return map_with_path(
            lambda path, leaf: jnp.zeros(leaf.shape, jnp.float32).at[self._places[path]].set(values[path]), like
        )

    def _take_values(self, kinds: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Array]]:
        return {
            kind: {path: leaf if kind == "count" else leaf[self._places[path]] for path, leaf in leaves.items()}
            for kind, leaves in kinds.items()
        }


def to_state_values(values: Any) -> StateValues:
    """Return values that were read to the devices."""
    return {
        kind: {path: np.asarray(each, np.float64) for path, each in leaves.items()}
        for kind, leaves in jax.device_get(values).items()
    }


def find_moments(opt_state: Any) -> dict[str, dict[str, Array]]:
    """Return the moments of Adam and the momentum of Muon, by the paths of their parameters, and their counts."""
    result: dict[str, dict[str, Array]] = {"mu": {}, "nu": {}, "count": {}}
    kinds = optax.ScaleByAdamState | MuonState

    for node in jax.tree.leaves(opt_state, is_leaf=lambda each: isinstance(each, kinds)):
        if isinstance(node, kinds):
            first = flatten(node.mu)
            result["mu"] |= first
            result["nu"] |= flatten(node.nu) if isinstance(node, optax.ScaleByAdamState) else {}
            count = node.count if isinstance(node, optax.ScaleByAdamState) else node.step
            result["count"] |= dict.fromkeys(first, jnp.asarray(count))
    return result


def write_state_values(path: Path, step: int, values: StateValues) -> None:
    """Write the values at a checkpoint, from which its next update can be checked after a restart."""
    values = {kind: {name: each.tolist() for name, each in leaves.items()} for kind, leaves in values.items()}
    write_json(path, {"step": step, "values": values})


def read_state_values(path: Path) -> tuple[int, StateValues] | None:
    """Return the step and the values of `write_state_values`; None if there are none."""
    if not path.is_file():
        return None
    document = read_json(path)
    values = {
        kind: {name: np.asarray(each, np.float64) for name, each in leaves.items()}
        for kind, leaves in document["values"].items()
    }
    return int(document["step"]), values


_EPSILON = 1e-8
"""Adam's own."""
_ROUNDING = 2.0**-21
"""Relative error of a float32 value that several operations have led to."""
_UPDATE_TOLERANCE = 0.02
"""Largest relative error of an update."""
_GRADIENT_TOLERANCE = 0.05
_MAX_MATRIX_RATIO = 4.0
"""Largest root mean square of a few values of Muon's update, relative to the whole update's."""
_MUON_BETA = 0.95
"""Decay of Muon's momentum."""


def compute_learning_rate(config: OptimizerConfig, steps: int, update: int) -> float:
    """Return the learning rate of an update, counted from 0: a linear warmup, then the schedule."""
    peak, schedule, warmup = config.learning_rate, config.schedule, config.schedule.warmup
    if not isinstance(schedule, Constant | Cosine | WarmupStableDecay):
        return float(config.make_schedule(steps=steps)(update))
    if update < warmup:
        return peak * (1 + (warmup - 1) * update / warmup) / warmup
    done, length = update - warmup, steps - warmup
    if isinstance(schedule, Cosine):
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done / length)))
    if isinstance(schedule, WarmupStableDecay):
        cooldown = max(1, min(int(schedule.decay * steps), length))
        return peak * min(1.0, max(0.0, (length - done) / cooldown))
    return peak


class UpdateCheck:
    """The check of the update between two consecutive states."""

    def __init__(self, subject: CheckedTraining, before: StateValues, after: StateValues, *, step: int):
        """Prepare the check of the update that led to `step` steps."""
        training = subject.training
        self._config = training.optimizer
        self._adam = self._config if isinstance(self._config, AdamW | Muon) else AdamW()
        self._subject, self._before, self._after, self._step = subject, before, after, step
        self._update = step - 1
        self._rate = compute_learning_rate(self._config, training.steps, self._update - subject.trainer.start_step)
        self._problems: list[Problem] = []

    def find_problems(self, gradients: Mapping[str, np.ndarray] | None = None, norm: float = 0.0) -> list[Problem]:
        """Return what differs from the equations.

        Args:
          gradients: Values of the loss's gradient at the state before; None to check the rest.
          norm: Norm of the whole gradient, by which it is clipped.
        """
        self._check_average()
        if isinstance(self._config, AdamW | Muon):
            self._check_counts()
            self._check_adam()
            self._check_matrices()
            if gradients is not None:
                self._check_gradients(gradients, norm)
        self._check_frozen()
        return self._problems

    def _add(self, check: str, message: str) -> None:
        self._problems.append(Problem(check, f"{message} (update to step {self._step})"))

    def _check_average(self) -> None:
        """Check $e' = e + (1 - d) (p' - e)$ with the decay of `update_ema`."""
        if isinstance(self._config, ScheduleFreeAdamW):
            return
        decay = min(self._subject.training.ema_decay, (1 + self._update) / (10 + self._update))
        errors = {}
        for path, average in self._before["ema"].items():
            params, actual = self._after["params"][path], self._after["ema"][path]
            expected = average + (1 - np.float64(np.float32(decay))) * (params - average)
            slack = _ROUNDING * np.abs(expected) + 1e-3 * (1 - decay) * np.abs(params - average) + 1e-12
            errors[path] = float((np.abs(actual - expected) / slack).max(initial=0))
        if errors and max(errors.values()) > 1:
            path = max(errors, key=lambda each: errors[each])
            self._add("ema", f"the average of {path} does not follow it with decay {decay:.4f}")

    def _check_counts(self) -> None:
        wrong = {int(count) for count in self._after["count"].values() if int(count) > self._step}
        moved = [int(self._after["count"][path]) - int(each) for path, each in self._before["count"].items()]
        if wrong or (moved and not set(moved) <= {0, 1}):
            self._add("resume", f"the optimizer has counted {sorted(wrong) or moved[0]} updates")

    @functools.cached_property
    def _received_gradients(self) -> dict[str, np.ndarray]:
        """Return the gradients that the optimizer received, clipped."""
        before, after, b1 = self._before["mu"], self._after["mu"], self._adam.b1
        beta = {path: b1 if path in self._after["nu"] else _MUON_BETA for path in after}
        return {path: (after[path] - beta[path] * before[path]) / (1 - beta[path]) for path in after if path in before}

    @functools.cached_property
    def _was_skipped(self) -> bool:
        """Return whether the step changed no parameter, as one that is not finite."""
        return all(np.array_equal(self._before["params"][path], each) for path, each in self._after["params"].items())

    def _check_adam(self) -> None:
        """Check second moments and parameters of AdamW (arXiv 1711.05101)."""
        if self._was_skipped:
            return
        config, errors, moments = self._adam, dict[str, float](), dict[str, float]()
        for path, gradient in self._received_gradients.items():
            if path not in self._after["nu"]:
                continue
            first, second = self._after["mu"][path], self._after["nu"][path]
            expected = config.b2 * self._before["nu"][path] + (1 - config.b2) * np.square(gradient)
            rounding = _ROUNDING * np.abs(first).max(initial=0) / (1 - config.b1)
            slack = 1e-3 * np.abs(expected) + 4 * rounding * np.abs(gradient) + 4 * rounding**2 + 1e-30
            moments[path] = float((np.abs(second - expected) / slack).max(initial=0))
            count = float(self._after["count"][path])
            direction = self._correct(first, gradient, count) / (np.sqrt(second / (1 - config.b2**count)) + _EPSILON)
            errors[path] = self._compare_update(path, direction)
        self._report(moments, "the second moments of {path} are not those of its gradients")
        self._report(errors, f"{{path}} did not move by AdamW's update with learning rate {self._rate:.3g}")

    def _correct(self, first: np.ndarray, gradient: np.ndarray, count: float) -> np.ndarray:
        """Return the first moments without bias; Muon's other parameters use Nesterov momentum."""
        b1 = self._adam.b1
        if isinstance(self._config, Muon):
            return b1 * first / (1 - b1 ** (count + 1)) + (1 - b1) * gradient / (1 - b1**count)
        return first / (1 - b1**count)

    def _compare_update(self, path: str, direction: np.ndarray) -> float:
        """Return the error of an update, relative to its tolerance."""
        before, after = self._before["params"][path], self._after["params"][path]
        decay = self._config.weight_decay if self._is_decayed(path) else 0.0
        rate = self._get_rate(path)
        expected = -rate * (direction + decay * before)
        slack = _UPDATE_TOLERANCE * np.abs(expected) + _ROUNDING * np.abs(before) + 0.01 * rate
        return float((np.abs((after - before) - expected) / slack).max(initial=0))

    def _get_rate(self, path: str) -> float:
        """Return the learning rate of a parameter."""
        factors = (factor for pattern, factor in self._config.rate_factors.items() if re.search(pattern, path))
        return self._rate * math.prod(factors)

    def _is_decayed(self, path: str) -> bool:
        return any(re.search(pattern, path) for pattern in self._config.weight_decay_patterns)

    def _report(self, errors: Mapping[str, float], message: str) -> None:
        if errors and max(errors.values()) > 1:
            worst = max(errors, key=lambda each: errors[each])
            count = sum(error > 1 for error in errors.values())
            note = f", as {count - 1} other parameters" if count > 1 else ""
            self._add("optimizer", message.format(path=worst) + note)

    def _check_matrices(self) -> None:
        """Check the size of Muon's updates: at most a full-rank matrix's, a multiple of the learning rate."""
        if not isinstance(self._config, Muon) or self._was_skipped:
            return
        errors = {}
        for path in self._after["mu"].keys() - self._after["nu"].keys():
            before, after = self._before["params"][path], self._after["params"][path]
            decay = self._config.weight_decay if self._is_decayed(path) else 0.0
            rate = self._get_rate(path)
            size = np.sqrt(np.square(after - before + rate * decay * before).mean())
            expected = rate * self._config.rms
            if expected > _ROUNDING * np.abs(before).max(initial=0):
                errors[path] = float(size / expected / _MAX_MATRIX_RATIO)
        self._report(errors, f"{{path}} did not move by Muon's update with learning rate {self._rate:.3g}")

    def _check_gradients(self, gradients: Mapping[str, np.ndarray], norm: float) -> None:
        """Check the gradients that the optimizer received against the loss's, and how they were clipped."""
        received = self._received_gradients
        paths = [path for path in received if path in gradients]
        if not paths or norm == 0:
            return
        actual, expected = (np.concatenate([each[path] for path in paths]) for each in (received, gradients))
        share = float(actual @ expected / max(expected @ expected, 1e-30))
        # The worst parameter, so that one without a gradient is noticed among many.
        scale = max(abs(share), 1e-30)
        errors = {
            path: float(np.linalg.norm(received[path] - share * gradients[path]) / (scale * size))
            for path in paths
            if (size := np.linalg.norm(gradients[path])) > 1e-4 * norm / math.sqrt(len(paths))
        }
        worst = max(errors, key=lambda each: errors[each], default="")
        clipped = min(1.0, self._config.max_grad_norm / norm)
        own_errors = [_compare_direction(received[path], gradients[path]) for path in errors]
        if errors and errors[worst] > _GRADIENT_TOLERANCE >= max(own_errors):
            self._add("optimizer", f"gradients of {worst} and of other parameters are not clipped by the same factor")
        elif errors and errors[worst] > _GRADIENT_TOLERANCE:
            self._add("gradient", f"the optimizer did not receive the gradient of {worst}: {errors[worst]:.0%} differ")
        elif abs(share / clipped - 1) > _GRADIENT_TOLERANCE:
            message = (
                f"gradients are scaled by {share:.3g}, not by {clipped:.3g}, to which the norm {norm:.3g} is clipped"
            )
            # A sum over devices or microbatches looks like an integer factor; a wrong clip depends on the norm.
            self._add("gradient" if share > clipped * 1.5 and clipped == 1 else "optimizer", message)

    def _check_frozen(self) -> None:
        frozen = [path for path in self._after["params"] if not self._subject.is_trained(path)]
        for path in frozen:
            if not np.array_equal(self._before["params"][path], self._after["params"][path]):
                self._add("trained_parameters", f"{path} is frozen, but changed")


def _compare_direction(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the part of an array that is no multiple of the expected one, relative to its own norm."""
    share = float(np.vdot(actual, expected)) / max(1e-30, float(np.vdot(expected, expected)))
    return float(np.linalg.norm(actual - share * expected)) / max(1e-30, float(np.linalg.norm(actual)))


def check_gradient_norm(logged: float, expected: float, *, step: int) -> list[Problem]:
    """Check the norm that a step logs against the norm of the loss's gradient."""
    if abs(logged / max(expected, 1e-30) - 1) <= _GRADIENT_TOLERANCE:
        return []
    return [
        Problem("gradient", f"the norm of the gradient is {logged:.3g} in step {step}, that of the loss {expected:.3g}")
    ]


def check_changes(
    subject: CheckedTraining,
    first: Mapping[str, int],
    last: Mapping[str, int],
    used: Mapping[str, bool],
    *,
    steps: int,
    name: str = "model",
) -> list[Problem]:
    """Check that parameters which the loss depends on have changed between two steps, by their digests.

    Args:
      subject: The training.
      first: Digest of each parameter at the first step.
      last: Digests at the last step.
      used: Whether the loss depends on the parameter.
      steps: Number of steps in between.
      name: Name of the network.
    """
    problems = []
    for path, digest in first.items():
        is_trained = subject.is_trained(path)
        if is_trained and used.get(path, True) and last[path] == digest:
            problems.append(f"{path} of the {name} is trained, but has not changed in {steps} steps")
        if not is_trained and last[path] != digest:
            problems.append(f"{path} of the {name} is frozen, but has changed in {steps} steps")
    return [Problem("trained_parameters", each) for each in problems]


_LOSS_TOLERANCE = 1e-3
_MAX_READ = 12
"""Number of parameters that are read again."""


class _ReadingPlacer:
    """Reads a few values of some parameters, and passes over the others."""

    def __init__(self, subject: CheckedTraining, reader: ValueReader, paths: list[str]):
        self.kernel_dtype = get_kernel_dtype(subject.training, subject.model.backbone)
        self._reader, self._paths = reader, set(paths)

    def __call__(self, path: str, parameter: Parameter) -> np.ndarray:
        if path not in self._paths or tuple(parameter.shape) != self._reader.shapes[path]:  # which has grown
            return np.zeros(0)
        return np.asarray(self._reader.take_from(path, parameter.to_host()), np.float64)


def check_initial_weights(
    subject: CheckedTraining, reader: ValueReader, values: StateValues, frozen: dict[str, Any] | None
) -> list[Problem]:
    """Check parameters after the first step against the files that a training begins with, where it has any.

    Args:
      subject: The training.
      reader: Reader of values of parameters.
      values: Values after the first step.
      frozen: Weights that adapters change, or a teacher's.
    """
    training = subject.training
    start = training.train.init_from
    if start is None:
        return []
    config = training.optimizer
    leaves = frozen if subject.trained.lora is not None else None
    own = ValueReader(subject, leaves) if leaves is not None else reader
    params = values["params"] if leaves is None else own.read_values(leaves)
    generator = subject.make_generator("initial weights")
    paths = [str(path) for path in generator.permutation(sorted(params))[:_MAX_READ]]
    _, stored_parts = read_initial_denoiser(start, _ReadingPlacer(subject, own, paths))  # type: ignore[arg-type]
    stored = flatten(stored_parts)
    rate = compute_learning_rate(config, training.steps, 0)
    problems = []
    for path in paths:
        if path not in stored or not len(stored[path]):
            continue
        moves = subject.is_trained(path) and leaves is None
        slack = (2 * rate * (1 + config.weight_decay * np.abs(stored[path])) if moves else 0) + 0.005 * np.abs(
            stored[path]
        )
        if (np.abs(params[path] - stored[path]) > slack + 1e-6).any():
            problems.append(Problem("initial_weights", f"{path} is not that of {start}"))
    return problems


def check_adapter_scale(subject: CheckedTraining, params: Any, rows: PackedBatch, loss: float) -> list[Problem]:
    """Check the loss of a step against the model's with the adapter attached by the config's scale.

    Args:
      subject: The training.
      params: Trained factors without zeros.
      rows: A batch of this process.
      loss: Loss of the step at step 0.
    """
    if subject.trained.lora is None:
        return []

    def compute(params: Any, frozen: Any, rows: PackedBatch) -> Array:
        return subject.loss(subject.merge_params(params, frozen), rows, jnp.int32(0)).value

    on_devices = shard_batch(rows, subject.trainer.mesh)
    expected = float(subject.jit(compute)(params, subject.frozen_params, on_devices))
    if abs(loss - expected) <= _LOSS_TOLERANCE * abs(expected):
        return []
    return [Problem("adapter", f"the loss is {loss:.4f}, with the adapter at the scale of the config {expected:.4f}")]


def check_adapter_paths(subject: CheckedTraining, params: Any) -> list[Problem]:
    """Check that the training of an adapter trains the factors of its targets, and nothing else."""
    lora = subject.trained.lora
    if lora is None:
        return []
    problems = []
    for path in flatten(split_heads(params)[0]):
        layer, _, factor = path.rpartition("/")
        if factor not in ("a", "b") or not any(re.search(pattern, layer) for pattern in lora.targets):
            problems.append(Problem("adapter", f"{path} is trained, but is no factor of the adapter"))
    return problems
