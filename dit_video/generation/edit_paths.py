"""Editing of a clip with a description of what it shows: FlowEdit, and inversion to noise."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_video.core.errors import UserError
from dit_video.core.rng import make_generator
from dit_video.generation.batches import ClipLatents
from dit_video.generation.stepper import LatentStepper


class EditPaths(NamedTuple):
    """The two paths of an edit, with Euler's solver and the same times."""

    source: LatentStepper
    """Steps for the description of the clip."""
    target: LatentStepper
    """Steps for the description of the result."""

    def find_first_step(self, strength: float) -> int:
        """Return the number of the first time that is not above a strength.

        Raises:
          UserError: a strength outside of (0, 1], or below the last time.
        """
        times = self.source.times
        if not 0 < strength <= 1:
            raise UserError(f"strength={strength} is invalid: it must be above 0 and at most 1. Use 0.8")
        first = int((times[:-1] > np.float32(strength)).sum(axis=0))
        if first == len(times) - 1:
            raise UserError(f"strength={strength} is invalid: no step begins below it. Use at least {times[-2]:.3g}")
        return first

    def edit_by_flow(self, latents: ClipLatents, *, strength: float, seed: int) -> ClipLatents:
        """Return the latents moved by the difference of both paths' slopes (FlowEdit, arXiv 2412.08629, algorithm 1).

        The slopes are those at noisy versions of the clip and of the result, with the same noise, which is drawn anew
        in every step. Parts that both descriptions share keep their place.

        Args:
          latents: latents of the clip.
          strength: time that the edit begins at.
          seed: seed of the noise.
        """
        process, times, edited = self.source.process, self.source.times, latents
        for step in range(self.find_first_step(strength), len(times) - 1):
            generator = make_generator(seed, "edit", step)
            noise = generator.standard_normal(latents.shape).astype(np.float32)
            start, end = (process.flow_coordinates(jnp.asarray(times[index])) for index in (step, step + 1))
            scale, next_scale = float(start.scale), float(end.scale)
            time = jnp.asarray(times[step])
            noisy = np.asarray(process.add_noise(jnp.asarray(latents), jnp.asarray(noise), time))
            moved = noisy + scale * (edited - latents)
            source, target = (
                path(values, [step, step + 1]) / next_scale - values / scale
                for path, values in ((self.source, noisy), (self.target, moved))
            )
            edited = edited + (target - source)
        return edited

    def edit_by_inversion(self, latents: ClipLatents, *, strength: float) -> ClipLatents:
        """Return the latents that the noise of the clip leads to with the other description.

        The noise is that of the probability flow with the clip's description (DDIM inversion, arXiv 2010.02502).

        Args:
          latents: latents of the clip.
          strength: time that the clip is inverted to.
        """
        first, last = self.find_first_step(strength), len(self.source.times) - 1
        noisy = self.source(latents, list(range(last, first - 1, -1)))
        return self.target(noisy, list(range(first, last + 1)))
