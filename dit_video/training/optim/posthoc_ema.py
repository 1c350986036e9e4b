"""Averages that are chosen when the training is done (Karras et al. 2024, arXiv 2312.02696, section 3.2).

During the training snapshots of power function averages are written. Any average of another width, as of any step up to
the last snapshot, is close to a linear combination of them: that whose weights over the training are nearest, in least
squares, to those wanted.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from dit_video.core.errors import MissingError
from dit_video.training.optim.ema import POWER, gamma_of, value_of
from dit_video.training.state import on_host
from dit_video.weights import load, save


class Profile(NamedTuple):
    """The weights `(gamma + 1) s^gamma / t^(gamma + 1)` over the steps s up to t."""

    step: float
    gamma: float


class Snapshots:
    """The snapshots of one training, in one folder: `STEP-SIGMA.safetensors`."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def write(self, step: int, state: Any) -> dict[str, float]:
        """Those of a state's power function averages. All processes call this; the first one writes.

        Returns nothing, as figures.
        """
        for name, tree in state.averages.get(POWER, {}).items():
            host = on_host(tree)
            if jax.process_index() == 0:
                save(self.folder / f"{step:08}-{name}.safetensors", host)
        return {}

    def reconstruct(
        self, sigma_rel: float, *, like: Any = None, step: int | None = None, last: int | None = None
    ) -> dict[str, Any]:
        """The average of this relative width.

        Args:
          sigma_rel: in lengths of the training.
          like: parameters, or shapes of them, whose structure the result has.
          step: as of which; of the last snapshot if None.
          last: the newest snapshot that belongs to the training: one that was killed may have left newer ones.

        Raises:
          MissingError: no snapshots.
          UserError: a width that no average has.
        """
        gamma = gamma_of(sigma_rel)
        files = {profile: path for profile, path in self._files().items() if last is None or profile.step <= last}
        if not files:
            raise MissingError(
                f"{self.folder} holds no snapshots of averages; train with averages=Averages(sigmas=(0.05, 0.1))"
            )
        profiles = sorted(files)
        wanted = Profile(max(profile.step for profile in profiles) if step is None else step, gamma)
        total: dict[str, Any] | None = None
        for weight, profile in zip(solve(profiles, wanted), profiles, strict=True):
            part = jax.tree.map(
                lambda leaf, weight=weight: weight * leaf.astype(np.float64), load(files[profile], like=like)
            )
            total = part if total is None else jax.tree.map(np.add, total, part)
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), total)

    def _files(self) -> dict[Profile, Path]:
        found = {}
        for path in self.folder.glob("*.safetensors"):
            if match := re.fullmatch(r"(\d+)-([\d_e-]+)", path.stem):
                found[Profile(int(match[1]), gamma_of(value_of(match[2])))] = path
        return found


def solve(profiles: Sequence[Profile], wanted: Profile) -> Float[np.ndarray, " n"]:
    """The coefficients of the combination of profiles that is nearest to the one wanted."""
    gram = np.array([[inner(left, right) for right in profiles] for left in profiles])
    target = np.array([inner(profile, wanted) for profile in profiles])
    # Of unit norms the equations are far better conditioned: those of late profiles are small.
    scale = 1 / np.sqrt(np.diag(gram))
    solution, *_ = np.linalg.lstsq(gram * scale[:, None] * scale[None], target * scale, rcond=1e-14)
    return solution * scale


def inner(left: Profile, right: Profile) -> float:
    """The integral of the product of two profiles.

    `(a + 1)(b + 1) / (a + b + 1) m^(a + b + 1) / (s^(a + 1) t^(b + 1))` for profiles of steps s and t, m being the
    earlier one.
    """
    a, b = left.gamma, right.gamma
    early = math.log(min(left.step, right.step))
    power = (a + b + 1) * early - (a + 1) * math.log(left.step) - (b + 1) * math.log(right.step)
    return (a + 1) * (b + 1) / (a + b + 1) * math.exp(power)
