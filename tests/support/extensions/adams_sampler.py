"""A sampler, as a file of another package."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from dit_video.core.registry import register
from dit_video.diffusion import Solver


class AdamsState(NamedTuple):
    x: Any
    slope: Any
    length: Any


@register
@dataclass(frozen=True, kw_only=True)
class Adams(Solver):
    """Adams and Bashforth's second order in flow coordinates."""

    share: float = 0.5

    def init(self, noisy, *, steps):
        return AdamsState(noisy, jnp.zeros_like(noisy), jnp.zeros(()))

    def step(self, estimate, process, state, interval):
        start, end = (process.flow_coordinates(time).integration_time for time in interval[:2])
        length, slope = end - start, process.flow_slope(estimate(state.x, interval.time))
        is_first = state.length == 0
        weight = jnp.where(is_first, 0.0, self.share * length / jnp.where(is_first, 1.0, state.length))
        extrapolated = (1 + weight) * slope - weight * state.slope
        return AdamsState(process.follow(state.x, extrapolated, *interval[:2]), slope, length)
