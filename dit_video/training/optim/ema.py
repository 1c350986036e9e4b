"""Moving averages of parameters over a training run, which are used for sampling.

An exponential moving average has one time scale. A power function average (Karras et al. 2024, arXiv 2312.02696,
section 3.1) at step t weighs the parameters of step s by s^gamma, so that its width is a fixed share `sigma_rel` of the
training: the standard deviation of the weights, relative to the length of the training. Snapshots of two such averages
allow any other to be reconstructed after the training, see `posthoc_ema`.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from dit_video.core.errors import MissingError, UserError, check_at_least
from dit_video.core.trees import map_with_path
from dit_video.distributed.gather import gather_parts, is_first_process
from dit_video.weights import save
from dit_video.weights.io import open_params_file, read_shapes
from dit_video.weights.parameter import Parameter, Placement, place_on_host

DECAY, POWER = "decay", "power"


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Configuration of further averages of the parameters, each as large as the parameters.

    Raises:
      UserError: If a value is out of range or given twice.
    """

    decays: tuple[float, ...] = ()
    """Decays of exponential moving averages."""
    sigmas: tuple[float, ...] = ()
    """Relative widths `sigma_rel` of power function averages. Post-hoc reconstruction needs two, such as .05 and .1."""
    snapshot_every: int = 1000
    """Steps between snapshots of the power function averages, which are written to `snapshots/`."""

    def __post_init__(self) -> None:
        for decay in self.decays:
            if not 0 < decay < 1:
                raise UserError(f"decays={self.decays} is invalid: {decay} does not lie between 0 and 1.")
        for sigma in self.sigmas:
            gamma_from_sigma(sigma)
        if len(set(self.decays)) < len(self.decays) or len(set(self.sigmas)) < len(self.sigmas):
            raise UserError(f"decays={self.decays}, sigmas={self.sigmas} is invalid: a value is repeated. Remove one.")
        check_at_least(1, snapshot_every=self.snapshot_every)

    def init_averages(self, params: PyTree) -> dict[str, Any]:
        """Return the averages before the first step, copies of the parameters by kind and value. Traceable."""
        kinds = {DECAY: self.decays, POWER: self.sigmas}
        names = {kind: [format_average_name(value) for value in values] for kind, values in kinds.items() if values}
        return {kind: {name: copy_float32(params) for name in names[kind]} for kind in names}


def copy_float32(params: PyTree) -> PyTree:
    """Return float32 copies of the parameters in memory of their own."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)


def update_ema(ema: PyTree, params: PyTree, step: Int[Array, ""], *, decay: float) -> PyTree:
    """Return `d ema + (1 - d) params` with `d = min(decay, (1 + step) / (10 + step))`, a warmup of the decay.

    The average of parameters that do not change is exactly constant, without rounding errors.
    """
    warm_decay = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return _interpolate(ema, params, 1 - warm_decay)


def update_power_average(average: PyTree, params: PyTree, step: Int[Array, ""], *, gamma: float) -> PyTree:
    """Return `b average + (1 - b) params` with `b = (1 - 1 / t)^(gamma + 1)`, t = step + 1 (arXiv 2312.02696, eq. 127).

    After t steps the weight of step s is `(s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1)`.
    """
    share = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step + 1).astype(jnp.float32)))
    return _interpolate(average, params, share)


def update_averages(averages: dict[str, dict[str, PyTree]], params: PyTree, step: Int[Array, ""]) -> dict[str, Any]:
    """Return the averages of `EmaConfig.init_averages`, updated by the parameters after a step."""

    def update(kind: str, name: str, average: PyTree) -> PyTree:
        value = parse_average_name(name)
        if kind == DECAY:
            return update_ema(average, params, step, decay=value)
        return update_power_average(average, params, step, gamma=gamma_from_sigma(value))

    return {kind: {name: update(kind, name, tree) for name, tree in trees.items()} for kind, trees in averages.items()}


def gamma_from_sigma(sigma_rel: float) -> float:
    """Return the exponent of the power function of a relative width (arXiv 2312.02696, eq. 126 and algorithm 2).

    It is the non-negative root of `sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1`.

    Raises:
      UserError: If no exponent has this width: it is not positive, or larger than about .2887, the width of equal
        weights.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise UserError(f"sigma_rel={sigma_rel} is invalid: it must be above 0, up to {12**-0.5:.4f}, a plain mean.")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def parse_average_name(name: str) -> float:
    """Return the decay or `sigma_rel` of an average from its name in the state."""
    return float(name.replace("_", "."))


def format_average_name(value: float) -> str:
    """Return the name in the state of an average, without the point that separates names in checkpoints."""
    return repr(float(value)).replace(".", "_")


def _interpolate(average: PyTree, params: PyTree, share: Array) -> PyTree:
    return jax.tree.map(lambda mean, value: mean + share * (value.astype(jnp.float32) - mean), average, params)


class WeightProfile(NamedTuple):
    """Weights `(gamma + 1) s^gamma / t^(gamma + 1)` of an average at step t over the steps s up to t."""

    step: float
    gamma: float


class EmaSnapshots:
    """Snapshots of the averages of one training run, in one folder as `STEP-SIGMA.safetensors`."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def write(self, step: int, state: Any) -> dict[str, float]:
        """Write snapshots of a state's power function averages, and return no metrics.

        All processes call this; the first one writes what they gather in parts.
        """
        for name, tree in state.averages.get(POWER, {}).items():
            path = self.folder / f"{step:08}-{name}.safetensors"
            save(path, gather_parts(tree), is_writer=is_first_process())
        return {}

    def reconstruct(
        self,
        sigma_rel: float,
        *,
        like: Any = None,
        step: int | None = None,
        max_step: int | None = None,
        place: Placement = place_on_host,
    ) -> dict[str, Any]:
        """Return the average of a relative width; the host holds one part of it at a time.

        Args:
          sigma_rel: Width of the average, relative to the length of the training.
          like: Parameters, or their shapes, which give the structure of the result.
          step: Step of the average; None for the last snapshot's.
          max_step: Step after which snapshots are ignored, such as those that a killed run wrote after its last
            checkpoint.
          place: Reads each parameter to its destination, given its path; by default to the host.

        Raises:
          MissingError: If there are no snapshots.
          UserError: If no average has this width.
        """
        gamma = gamma_from_sigma(sigma_rel)
        end = math.inf if max_step is None else max_step
        files = {profile: path for profile, path in self._list_files().items() if profile.step <= end}
        if not files:
            raise MissingError(f"{self.folder} has no snapshots. Train with averages=EmaConfig(sigmas=(0.05, 0.1)).")
        profiles = sorted(files)
        target = WeightProfile(max(profile.step for profile in profiles) if step is None else step, gamma)
        weights = solve_coefficients(profiles, target)
        like = read_shapes(files[profiles[0]]) if like is None else like
        with contextlib.ExitStack() as stack:
            sources = [stack.enter_context(open_params_file(files[profile], like)) for profile in profiles]

            def read_parts(path: str) -> Iterator[np.ndarray]:
                for parts in zip(*(source.read_chunks(path, None) for source in sources), strict=True):
                    total = sum(weight * part.astype(np.float64) for weight, part in zip(weights, parts, strict=True))
                    yield np.asarray(total, np.float32)

            def read_average(path: str, leaf: Any) -> Any:
                return place(path, Parameter(tuple(leaf.shape), np.dtype(np.float32), lambda: read_parts(path)))

            return map_with_path(read_average, like)

    def _list_files(self) -> dict[WeightProfile, Path]:
        paths = {}
        for path in self.folder.glob("*.safetensors"):
            if match := re.fullmatch(r"(\d+)-([\d_e-]+)", path.stem):
                paths[WeightProfile(int(match[1]), gamma_from_sigma(parse_average_name(match[2])))] = path
        return paths


def solve_coefficients(profiles: Sequence[WeightProfile], target: WeightProfile) -> Float[np.ndarray, " n"]:
    """Return the coefficients of the combination of profiles that is closest to the target profile."""
    gram = np.array([[inner_product(left, right) for right in profiles] for left in profiles])
    products = np.array([inner_product(profile, target) for profile in profiles])
    # Profiles are normalized, as late ones have much smaller norms: this improves the conditioning a lot.
    scale = 1 / np.sqrt(np.diag(gram))
    solution, *_ = np.linalg.lstsq(gram * scale[:, None] * scale[None], products * scale, rcond=1e-14)
    return solution * scale


def inner_product(left: WeightProfile, right: WeightProfile) -> float:
    """Return the integral of the product of two profiles.

    `(a + 1)(b + 1) / (a + b + 1) m^(a + b + 1) / (s^(a + 1) t^(b + 1))` for profiles of steps s and t, m being the
    earlier one.
    """
    a, b = left.gamma, right.gamma
    log_min_step = math.log(min(left.step, right.step))
    power = (a + b + 1) * log_min_step - (a + 1) * math.log(left.step) - (b + 1) * math.log(right.step)
    return (a + 1) * (b + 1) / (a + b + 1) * math.exp(power)
