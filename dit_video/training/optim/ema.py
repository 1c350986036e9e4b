"""Averages of parameters over a training: what is sampled from.

An exponential moving average forgets at one rate. A power function average (Karras et al. 2024, arXiv 2312.02696,
section 3.1) weighs the parameters of step s, of t, by s^gamma: so its width is a share `sigma_rel` of the training, the
deviation of the weights in lengths of the training. From snapshots of two such averages any third is put together when
the training is done: see `posthoc`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from dit_video.core.errors import UserError

DECAY, POWER = "decay", "power"


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Which averages are kept beside the first one, each as large as the parameters.

    Raises:
      UserError: values out of range, or one twice.
    """

    decays: tuple[float, ...] = ()
    """of exponential moving averages"""
    sigmas: tuple[float, ...] = ()
    """`sigma_rel` of power function averages: two of them, such as .05 and .1, for any to be put together later"""
    snapshot_every: int = 1000
    """steps, after which the power function averages are written to `snapshots/`"""

    def __post_init__(self) -> None:
        for decay in self.decays:
            if not 0 < decay < 1:
                raise UserError(f"the decay of an average lies between 0 and 1, not {decay}")
        for sigma in self.sigmas:
            gamma_of(sigma)
        if len(set(self.decays)) < len(self.decays) or len(set(self.sigmas)) < len(self.sigmas):
            raise UserError("an average is kept once: give decays and sigmas that differ")
        if self.snapshot_every < 1:
            raise UserError(f"snapshot_every is at least 1, not {self.snapshot_every}; give a number of steps")

    def start(self, params: PyTree) -> dict[str, Any]:
        """All of them before the first step: copies, by what they are. Traceable."""
        kinds = {DECAY: self.decays, POWER: self.sigmas}
        return {kind: {name_of(value): copied(params) for value in values} for kind, values in kinds.items() if values}


def copied(params: PyTree) -> PyTree:
    """Other memory, in float32."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)


def update_ema(ema: PyTree, params: PyTree, step: Int[Array, ""], *, decay: float) -> PyTree:
    """`d ema + (1 - d) params` with `d = min(decay, (1 + step) / (10 + step))`, so that early steps count less.

    Computed so that the average of what does not move does not move either, not by a bit.
    """
    warm = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return _toward(ema, params, 1 - warm)


def update_power(average: PyTree, params: PyTree, step: Int[Array, ""], *, gamma: float) -> PyTree:
    """`b average + (1 - b) params` with `b = (1 - 1 / t)^(gamma + 1)`, t = step + 1 (arXiv 2312.02696, eq. 127).

    After t steps the weight of step s is `(s^(gamma + 1) - (s - 1)^(gamma + 1)) / t^(gamma + 1)`.
    """
    gone = -jnp.expm1((gamma + 1) * jnp.log1p(-1 / (step + 1).astype(jnp.float32)))
    return _toward(average, params, gone)


def update_averages(
    averages: Mapping[str, Mapping[str, PyTree]], params: PyTree, step: Int[Array, ""]
) -> dict[str, Any]:
    """All of `Averages.start` after a step, by the parameters that it led to."""
    decays, powers = averages.get(DECAY, {}), averages.get(POWER, {})
    found = {
        DECAY: {name: update_ema(tree, params, step, decay=value_of(name)) for name, tree in decays.items()},
        POWER: {
            name: update_power(tree, params, step, gamma=gamma_of(value_of(name))) for name, tree in powers.items()
        },
    }
    return {kind: trees for kind, trees in found.items() if trees}


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function of a relative width (arXiv 2312.02696, eq. 126 and algorithm 2).

    It is the root of `sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1` that is not negative.

    Raises:
      UserError: a width that no exponent has: from about .2887 on (that of equal weights), or not positive.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise UserError(f"sigma_rel lies above 0 and at most at {12**-0.5:.4f}, that of a plain mean, not {sigma_rel}")
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real.max()))


def sigma_of(gamma: float) -> float:
    """The relative width of an exponent."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def value_of(name: str) -> float:
    """What an average's name in the state says: its decay, or its `sigma_rel`."""
    return float(name.replace("_", "."))


def name_of(value: float) -> str:
    """What an average is called in the state: without a point, which separates names in checkpoints."""
    return repr(float(value)).replace(".", "_")


def _toward(average: PyTree, params: PyTree, share: Array) -> PyTree:
    return jax.tree.map(lambda mean, value: mean + share * (value.astype(jnp.float32) - mean), average, params)
