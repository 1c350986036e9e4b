"""Editing of a clip with a description of what it shows: FlowEdit, and inversion to noise.

Both follow paths of latents, which a `LatentStepper` moves between any times, towards data or towards noise.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.rng import make_generator
from dit_video.diffusion import Process, SampleTimes
from dit_video.sampling.denoiser import Denoiser
from dit_video.sampling.packing import ClipLatents, SamplingRequest, embed_prompts, plan_batches
from dit_video.sampling.sampler import BatchSampler, estimate_parts, init_state
from dit_video.sampling.sampling_config import Sampling
from dit_video.tokens import LayoutShape

_BLOCK_STEPS = 4
"""Number of steps of an inversion that are taken together."""


class LatentStepper:
    """The denoiser and solver for the latents of one request, whose prompt is embedded once.

    Args:
      denoiser: The trained denoiser.
      request: The request, whose noise gives the size.
      sampling: Solver, guidance and times.
      shape: Shape of a row.

    Raises:
      UserError: If `sample_latents` would refuse the request.
    """

    def __init__(self, denoiser: Denoiser, request: SamplingRequest, *, sampling: Sampling, shape: LayoutShape):
        texts = embed_prompts(denoiser, [request], sampling)
        (self._planned,) = plan_batches(denoiser, [request], texts, sampling, shape, 1)
        self._sampler = BatchSampler(denoiser, sampling)
        self.process: Process = denoiser.process
        self.sampling, self.plan = sampling, request.plan
        self._times = self._planned.sample_times
        self.times = np.asarray(self._times.times, np.float32)
        """Times of all steps, and the last one."""

    def __call__(self, latents: ClipLatents, steps: Sequence[int]) -> ClipLatents:
        """Return the latents at the last of some times, from those at the first one.

        Args:
          latents: The noisy latents.
          steps: Numbers of the times, falling or rising.

        Raises:
          UserError: If values are not finite.
        """
        planned, sampler = self._planned, self._sampler
        tokens = jnp.asarray(planned.pack_latents(planned.batch.branches[0].tokens, {0: latents}))
        state = init_state(sampler.sampling, tokens, steps=len(steps) - 1)
        for number, expert, part in self._split_experts(steps):
            times = SampleTimes(*(values[np.asarray(part)] for values in self._times))
            state = sampler.start_model(number, planned, state)
            with sampler.denoiser.open_params(expert) as params:
                program, arguments = sampler.prepare_steps(params, number, planned, state, times, part[0])
                state = jax.block_until_ready(program(*arguments))
        result = planned.unpack_latents(state.x)[0]
        if not np.isfinite(result).all():
            time = float(self.times[steps[0]])
            raise UserError(f"the steps from time {time:.4g} gave NaN or infinity. Use more steps")
        return result

    def _split_experts(self, steps: Sequence[int]) -> list[tuple[int, str, list[int]]]:
        """Return the steps of each expert, with its number and name: it takes those whose noisier end is its own."""
        denoiser = self._sampler.denoiser
        if denoiser.boundary is None:
            return [(0, denoiser.experts[0], list(steps))]
        model_times = np.asarray(self._times.model_times, np.float32)
        parts: list[tuple[int, str, list[int]]] = []
        for first, last in itertools.pairwise(steps):
            number = int(model_times[[first, last]].max(axis=0) < np.float32(denoiser.boundary))
            if parts and parts[-1][0] == number:
                parts[-1][2].append(last)
            else:
                parts.append((number, denoiser.experts[number], [first, last]))
        return parts


class EditProgress(NamedTuple):
    """The progress of an edit after some of its steps, as `SamplingProgress` is that of sampling."""

    step: int
    """Number of steps that are done."""
    steps: int
    """Number of all steps; those of an inversion lead to noise and back."""
    latents: ClipLatents
    """Latents that the steps lead to."""
    requests: tuple[int, ...] = (0,)

    def estimate_latents(self) -> dict[int, ClipLatents]:
        """Return the latents that the steps lead to, by the number of the request."""
        return {0: self.latents}


EditMonitor = Callable[[EditProgress], object]
"""A function that is called with the progress of an edit. What it raises ends the edit."""


class EditPaths(NamedTuple):
    """The two paths of an edit, with Euler's solver and the same times."""

    source: LatentStepper
    """Steps for the description of the clip."""
    target: LatentStepper
    """Steps for the description of the result."""

    def find_first_step(self, strength: float) -> int:
        """Return the number of the first time that is not above a strength.

        Raises:
          UserError: If the strength is outside of (0, 1], or below the last time.
        """
        times = self.source.times
        if not 0 < strength <= 1:
            raise UserError(f"strength={strength} is invalid: it must be above 0 and at most 1. Use 0.8")
        first = int((times[:-1] > np.float32(strength)).sum(axis=0))
        if first == len(times) - 1:
            raise UserError(f"strength={strength} is invalid: no step begins below it. Use at least {times[-2]:.3g}")
        return first

    def edit_by_flow(
        self, latents: ClipLatents, *, strength: float, seed: int, draws: int = 1, monitor: EditMonitor | None = None
    ) -> ClipLatents:
        """Return the latents moved by the difference of both paths' slopes (FlowEdit, arXiv 2412.08629, algorithm 1).

        The slopes are those at noisy versions of the clip and of the result, with the same noise, which is drawn anew
        in every step. Parts that both descriptions share keep their place, and do so better on the average of several
        draws.

        Args:
          latents: Latents of the clip.
          strength: Time that the edit begins at.
          seed: Seed of the noise.
          draws: Number of noises in every step, whose differences are averaged (n_avg of the paper).
          monitor: Called after every step.

        Raises:
          UserError: If there are no draws, or the strength is invalid or below the last time.
        """
        check_at_least(1, draws=draws)
        edited = latents
        first, last = self.find_first_step(strength), len(self.source.times) - 1
        for step in range(first, last):
            generator = make_generator(seed, "edit", step)
            noises = generator.standard_normal((draws, *latents.shape)).astype(np.float32)
            changes = [self._compare_slopes(latents, edited, noise, step) for noise in noises]
            edited = edited + np.mean(changes, axis=0)
            if monitor is not None:
                monitor(EditProgress(step + 1 - first, last - first, edited))
        return edited

    def _compare_slopes(self, latents: ClipLatents, edited: ClipLatents, noise: ClipLatents, step: int) -> ClipLatents:
        """Return the difference that a step on both paths makes, from the clip and from the result with a noise."""
        process, times = self.source.process, self.source.times
        start, end = (process.flow_coordinates(jnp.asarray(times[number])) for number in (step, step + 1))
        scale, next_scale = float(start.scale), float(end.scale)
        noisy = np.asarray(process.add_noise(jnp.asarray(latents), jnp.asarray(noise), jnp.asarray(times[step])))
        moved = noisy + scale * (edited - latents)
        source, target = (
            path(values, [step, step + 1]) / next_scale - values / scale
            for path, values in ((self.source, noisy), (self.target, moved))
        )
        return target - source

    def edit_by_inversion(
        self, latents: ClipLatents, *, strength: float, monitor: EditMonitor | None = None
    ) -> ClipLatents:
        """Return the latents that the noise of the clip leads to with the other description.

        The noise is that of the probability flow with the clip's description (DDIM inversion, arXiv 2010.02502).

        Args:
          latents: Latents of the clip.
          strength: Time that the clip is inverted to.
          monitor: Called after every few steps.
        """
        first, last = self.find_first_step(strength), len(self.source.times) - 1
        count = last - first

        def report(step: int, estimate: ClipLatents) -> None:
            if monitor is not None:
                monitor(EditProgress(step, 2 * count, estimate))

        values = latents
        for part in _split_steps(range(last, first - 1, -1)):
            values = self.source(values, part)
            report(last - part[-1], latents)
        for part in _split_steps(range(first, last + 1)):
            before, values = values, self.target(values, part)
            report(count + part[-1] - first, self._estimate_data(before, values, part))
        return values

    def _estimate_data(self, before: ClipLatents, after: ClipLatents, steps: Sequence[int]) -> ClipLatents:
        """Return the latents that the steps lead to."""
        times = (jnp.asarray(self.target.times[number]) for number in (steps[0], steps[-1]))
        data, _ = estimate_parts(self.target.process, jnp.asarray(before), jnp.asarray(after), *times)
        return np.asarray(data)


def _split_steps(steps: Sequence[int]) -> list[Sequence[int]]:
    """Return steps in parts of a few; each begins where the former one ends."""
    return [steps[start : start + _BLOCK_STEPS + 1] for start in range(0, len(steps) - 1, _BLOCK_STEPS)]
