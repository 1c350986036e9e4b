"""Blocks of steps: their length, what they lead to, and reports of the progress between them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.diffusion import Process
from dit_video.sampling.batches import PlannedBatch

_BLOCK_STEPS = 8
"""Number of steps in a block, after which Ctrl-C stops a run."""
_UPDATES = 16
"""Number of blocks of all steps, if latents are changed or steps are repeated between them."""


class SamplingProgress(NamedTuple):
    """The progress of the requests that are sampled together, after a block of steps."""

    planned: PlannedBatch
    step: int
    """Number of steps that are done."""
    steps: int
    """Number of all steps."""
    data: Float[Array, "B N p"]
    """Tokens of the data that the block's steps lead to."""

    @property
    def requests(self) -> tuple[int, ...]:
        """Return the numbers of the requests."""
        return tuple(sorted(index for row in self.planned.row_requests for index in row))

    def estimate_latents(self) -> dict[int, Float32[np.ndarray, "_ _ _ c"]]:
        """Return the latents `t h w c` that every request leads to, for previews."""
        return self.planned.unpack_latents(self.data)


class Monitor(NamedTuple):
    """A function that is called with the progress after every block of steps. What it raises ends the sampling."""

    function: Callable[[SamplingProgress], object]
    block_steps: int = _BLOCK_STEPS
    """Number of steps in a block, unless latents are changed or steps are repeated between blocks."""


def choose_block_steps(planned: PlannedBatch, monitor: Monitor | None) -> int:
    """Return the number of steps in a block of a batch."""
    if planned.has_updates or planned.resample > 1:
        # Results depend on these blocks, and not on who watches.
        return min(_BLOCK_STEPS, -(-(len(planned.times) - 1) // _UPDATES))
    return _BLOCK_STEPS if monitor is None else monitor.block_steps


def estimate_parts(
    process: Process,
    before: Float[Array, "*shape"],
    after: Float[Array, "*shape"],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return the data and the noise of which samples at two times are mixtures.

    This is the model's estimate for one step of DDIM, and that of its mean for several. It needs no further evaluation.
    """
    alpha, sigma, next_alpha, next_sigma = (
        function(each) for each in (time, next_time) for function in (process.alpha, process.sigma)
    )
    determinant = next_alpha * sigma - alpha * next_sigma
    data = (sigma * after - next_sigma * before) / determinant
    return data, (next_alpha * before - alpha * after) / determinant


def return_to_time(
    process: Process,
    sample: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> Float[Array, "*shape"]:
    """Return a sample at `next_time` with noise added up to the earlier `time` of sampling (RePaint, equation 1)."""
    alpha_ratio = process.alpha(time) / process.alpha(next_time)
    return alpha_ratio * sample + process.added_variance(time, next_time) ** 0.5 * noise
