"""A few values of each array of a state: enough to recompute an update, and cheap to read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from dit_video.core.files import read_json, write_json
from dit_video.core.trees import flatten, map_with_path
from dit_video.experiment.self_check.subject import CheckedTraining
from dit_video.training.optim.muon import MuonState

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
        self._places = {path: _choose_places(generator, leaf.shape) for path, leaf in flatten(params).items()}
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


def _choose_places(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[Int[np.ndarray, " k"], ...]:
    return tuple(generator.integers(size, size=COUNT) for size in shape)


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
