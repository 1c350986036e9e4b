"""Seamless loops, by rolling of the latents along time between blocks of steps.

So the place where the end meets the beginning is in the middle of the clip for most steps, as in Mobius (arXiv
2502.20307). The first latent frame stands for a single pixel frame and cannot be rolled with the others: it is the
frame before the loop, so it is encoded again from the loop's last frame after every roll.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.plan import BlockEnd, LatentUpdate, SamplingPlan
from dit_video.sampling.request import GenerationTask, Request, TaskModel
from dit_video.sampling.trained_conditioning import plan_trained
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class SeamlessLoop(GenerationTask):
    """Clips whose second frame follows their last: all frames but the first are a loop, from a prompt."""

    def __call__(self, request: Request, model: TaskModel) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: a request with pictures, or with too few frames for a loop.
        """
        request.check_pictures(())
        if request.grid.t < 1 + 2 * model.codec.config.stride.t:
            fix = f"Use at least {1 + 2 * model.codec.config.stride.t}"
            raise UserError(f"size={request.grid} is invalid: there is nothing to roll. {fix} frames")
        plan = plan_trained(None, request.grid, model)
        return plan._replace(update=TimeRoll(codec=model.codec, seed=request.seed))


@dataclass(frozen=True, kw_only=True, eq=False)
class TimeRoll(LatentUpdate):
    """A roll of all latent frames but the first by a number that is drawn from the seed."""

    codec: LatentCodec
    seed: int

    def __call__(self, latents: Float32[np.ndarray, "t h w c"], end: BlockEnd) -> Float32[np.ndarray, "t h w c"]:
        """Return the rolled latents, with the frame before them first."""
        generator = np.random.default_rng([self.seed, end.number])
        shift = int(generator.integers(1, len(latents) - 1))
        rolled = np.roll(latents[1:], shift, axis=0)
        # The frame before the rolled loop is the last one of the latent frame that is now the last.
        decoded = self.codec.decode(end.data, fps=1.0).frames
        last = len(decoded) - 1 - shift * self.codec.config.stride.t
        first = end.combine(self.codec.encode(Clip(decoded[last : last + 1], 1.0)), end.noise[:1])
        return np.concatenate([first, rolled])
