"""Moving averages of parameters over a training run, which are used for sampling.

An exponential moving average has one time scale. A power function average (Karras et al. 2024, arXiv 2312.02696,
section 3.1) at step t weighs the parameters of step s by s^gamma, so that its width is a fixed share `sigma_rel` of the
training: the standard deviation of the weights, relative to the length of the training. Snapshots of two such averages
allow any other to be reconstructed after the training, see `posthoc_ema`.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dit_video.core.errors import UserError, check_at_least

DECAY, POWER = "decay", "power"


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Configuration of further averages of the parameters, each as large as the parameters.

    Raises:
      UserError: Values out of range, or given twice.
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
      UserError: No exponent has this width: it is not positive, or larger than about .2887, that of equal weights.
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
