"""Generation of a clip from a prompt, images and keyframes, and of seamless loops.

A loop is made by rolling of the latents along time between blocks of steps. So the place where the end meets the
beginning is in the middle of the clip for most steps, as in Mobius (arXiv 2502.20307). The first latent frame stands
for a single pixel frame and cannot be rolled with the others: it is the frame before the loop, so it is encoded again
from the loop's last frame after every roll.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.completion import plan_trained
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.plan import BlockEnd, LatentUpdate, SamplingPlan
from dit_video.sampling.request import Condition, GenerationTask, Image, Request, TaskModel
from dit_video.sampling.tasks.clip_task import ClipTask
from dit_video.tokens import Grid
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Generate(ClipTask):
    """A clip from a prompt, perhaps with some of its frames."""

    size: Grid | tuple[int, int, int] | None = None
    """Frames, height and width; None for the model's own."""
    image: Image | None = None
    """First frame."""
    last_image: Image | None = None
    """Last frame."""
    conditions: Sequence[Condition] = ()
    """Images and clips at some frames."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request."""
        return Request(
            self.prompt or "", self.size, image=self.image, last_image=self.last_image, conditions=self.conditions
        )


@dataclass(frozen=True, kw_only=True)
class Loop(ClipTask):
    """A clip whose first frame follows its last."""

    size: tuple[int, int, int] | None = None
    """Frames, height and width; frames are a multiple of the temporal stride. None for one frame less than the model's
    own size."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of a clip with a further first frame, which is that before the loop: its last."""
        stride = config.model.autoencoder.stride.t
        frames, height, width = self.size or config.size._replace(t=config.size.t - 1)
        if frames < 2 * stride or frames % stride:
            below = max(2 * stride, frames - frames % stride)
            rule = f"a loop has a multiple of {stride} frames, at least {2 * stride}"
            fix = f"Use {below} or {below + stride} frames"
            raise UserError(f"size={(frames, height, width)} is invalid: {rule}. {fix}")
        return Request(self.prompt or "", (frames + 1, height, width), task=SeamlessLoop())

    def finish(self, sampled: Clip) -> Clip:
        """Return the loop, without the frame before it."""
        return replace(sampled, frames=sampled.frames[1:])


@dataclass(frozen=True, kw_only=True)
class SeamlessLoop(GenerationTask):
    """Clips whose second frame follows their last: all frames but the first are a loop, from a prompt."""

    def __call__(self, request: Request, model: TaskModel) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: If the request has pictures, or too few frames for a loop.
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
