"""Post-hoc reconstruction of power function averages (Karras et al. 2024, arXiv 2312.02696, section 3.2).

Snapshots of power function averages are written during the training. An average of any other width, at any step up to
the last snapshot, is approximated by the linear combination of snapshots whose weights over the training steps are
closest in the least squares sense.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dit_video.core.errors import MissingError
from dit_video.core.trees import map_with_path
from dit_video.distributed.gather import gather_parts, is_first_process
from dit_video.training.optim.ema import POWER, gamma_from_sigma, parse_average_name
from dit_video.weights import save
from dit_video.weights.native_format import open_params_file, read_shapes
from dit_video.weights.parameter import Parameter, Placement, place_on_host


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
        """Return the average of a relative width, of which the host holds one part at a time.

        Args:
          sigma_rel: Width of the average, relative to the length of the training.
          like: Parameters, or their shapes, which give the structure of the result.
          step: Step of the average; that of the last snapshot if None.
          max_step: Step after which snapshots are ignored, such as those that a killed run wrote after its last
            checkpoint.
          place: Reads each parameter to its destination, given its path; by default to the host.

        Raises:
          MissingError: There are no snapshots.
          UserError: No average has this width.
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
