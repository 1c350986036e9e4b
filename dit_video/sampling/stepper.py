"""Steps of latents between any times, towards data or towards noise, for methods that follow several paths at once."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dit_video.core.errors import UserError
from dit_video.diffusion import Process, SampleTimes
from dit_video.sampling.batches import ClipLatents, embed_prompts, plan_batches
from dit_video.sampling.denoiser import Denoiser
from dit_video.sampling.packing import SamplingRequest
from dit_video.sampling.sampler import BatchSampler, init_state
from dit_video.sampling.sampling_config import Sampling
from dit_video.tokens import LayoutShape


class LatentStepper:
    """The denoiser and solver for the latents of one request, whose prompt is embedded once.

    Args:
      denoiser: the trained denoiser.
      request: the request, whose noise gives the size.
      sampling: solver, guidance and times.
      shape: shape of a row.

    Raises:
      UserError: what `sample_latents` would refuse.
    """

    def __init__(self, denoiser: Denoiser, request: SamplingRequest, *, sampling: Sampling, shape: LayoutShape):
        texts = embed_prompts(denoiser, [request], sampling)
        (self._planned,) = plan_batches(denoiser, [request], texts, sampling, shape, 1)
        self._sampler = BatchSampler(denoiser, sampling)
        self.process: Process = denoiser.process
        self.sampling = sampling
        self._times = self._planned.sample_times
        self.times = np.asarray(self._times.times, np.float32)
        """Times of all steps, and the last one."""

    def __call__(self, latents: ClipLatents, steps: Sequence[int]) -> ClipLatents:
        """Return the latents at the last of some times, from those at the first one.

        Args:
          latents: the noisy latents.
          steps: numbers of the times, falling or rising.

        Raises:
          UserError: values that are not finite.
        """
        planned, sampler = self._planned, self._sampler
        tokens = jnp.asarray(planned.pack_latents(planned.batch.branches[0].tokens, {0: latents}))
        state = init_state(sampler.sampling, tokens, steps=len(steps) - 1)
        for number, expert, part in self._split_experts(steps):
            times = SampleTimes(*(values[np.asarray(part)] for values in self._times))
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
