"""Generation of a clip from a prompt, images and keyframes, and of seamless loops.

A loop is made by rolling of the latents along time between blocks of steps. So the place where the end meets the
beginning is in the middle of the clip for most steps, as in Mobius (arXiv 2502.20307). The first latent frame stands
for a single pixel frame and cannot be rolled with the others: it is the frame before the loop, so it is encoded again
from the loop's last frame after every roll.

The second turn that is decoded is the loop, so that its beginning is decoded after its end. An autoencoder's frames
change most where one latent frame ends and the next begins, so the loop is cut within one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError
from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.completion import plan_trained
from dit_video.sampling.pictures import Mask
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.plan import BlockEnd, DecodingChange, LatentUpdate, SamplingPlan
from dit_video.sampling.request import Condition, Conditioner, ModelParts, Request, Size
from dit_video.sampling.tasks.fields import Doc, Limits, OneFrame
from dit_video.sampling.tasks.task import Task
from dit_video.video import Clip


@dataclass(frozen=True, eq=False)
class Generate(Task):
    """A clip from a prompt, perhaps with parts that are known."""

    prompt: Annotated[str | None, Doc("Description of the clip.")] = None
    _: KW_ONLY
    size: Annotated[Size | None, Doc("Frames, height and width; the model's own by default.")] = None
    image: Annotated[Clip | None, OneFrame, Doc("First frame.", title="First frame")] = None
    last_image: Annotated[Clip | None, OneFrame, Doc("Last frame.", title="Last frame")] = None
    video: Annotated[
        Clip | None, Doc("Clip that is kept where the mask says so, or that the strength changes.", title="Video")
    ] = None
    generated: Annotated[
        Mask | None, Doc("Mask of the video, white (True) where it is generated.", title="Region to generate")
    ] = None
    strength: Annotated[
        float | None,
        Doc("Diffusion time that the video is noised to, and at which sampling starts."),
        Limits(above=0, maximum=1, step=0.05),
    ] = None
    conditions: Annotated[Sequence[Condition], Doc("Images and clips at some frames.")] = ()

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request."""
        return Request(
            self.prompt or "",
            self.size,
            image=self.image,
            last_image=self.last_image,
            video=self.video,
            generated=self.generated,
            strength=self.strength,
            conditions=self.conditions,
        )

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return the model's own size."""
        return {"size": config.size}


@dataclass(frozen=True)
class Loop(Task):
    """A clip whose first frame follows its last."""

    prompt: Annotated[str | None, Doc("Description of the clip.")] = None
    _: KW_ONLY
    size: Annotated[
        Size | None,
        Doc(
            "Frames, a multiple of the temporal stride, height and width; by default one frame less than the model's "
            "own size."
        ),
    ] = None

    @classmethod
    def suggest(cls, config: PipelineConfig) -> Mapping[str, Any]:
        """Return the model's own size, with a number of frames that is a multiple of the stride."""
        stride = config.model.autoencoder.stride.t
        return {"size": config.size._replace(t=max(2 * stride, config.size.t - config.size.t % stride))}

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of a clip with a further first frame, which is that before the loop: its last."""
        stride = config.model.autoencoder.stride.t
        frames, height, width = self.size or config.size._replace(t=config.size.t - 1)
        if frames < 2 * stride or frames % stride:
            below = max(2 * stride, frames - frames % stride)
            rule = f"a loop has a multiple of {stride} frames, at least {2 * stride}"
            fix = f"Use {below} or {below + stride} frames"
            raise UserError(f"size={(frames, height, width)} is invalid: {rule}. {fix}")
        return Request(self.prompt or "", (frames + 1, height, width), conditioner=SeamlessLoop())

    def finish(self, sampled: Clip) -> Clip:
        """Return the loop, without the frame before it."""
        return replace(sampled, frames=sampled.frames[1:])


@dataclass(frozen=True, kw_only=True)
class SeamlessLoop(Conditioner):
    """Clips whose second frame follows their last: all frames but the first are a loop, from a prompt."""

    def __call__(self, request: Request, model: ModelParts) -> SamplingPlan:
        """Return the plan of a request.

        Raises:
          UserError: If the request has pictures, or too few frames for a loop, or the model always needs an image.
        """
        request.check_pictures(())
        if model.frame_conditioning is not None and model.frame_conditioning.is_required:
            rule = "this model animates an image, and a loop is made from a prompt alone"
            raise UserError(f"a loop is invalid: {rule}. Use a model of text to video")
        stride = model.codec.config.stride.t
        if request.grid.t < 1 + 2 * stride:
            fix = f"Use at least {1 + 2 * stride}"
            raise UserError(f"size={request.grid} is invalid: there is nothing to roll. {fix} frames")
        plan = plan_trained(None, request.grid, model)
        turns = LoopTurns(count=3 if model.codec.config.is_decoder_symmetric else 2, shift=stride // 2)
        return plan._replace(update=TimeRoll(codec=model.codec, seed=request.seed), decoding=turns)


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


@dataclass(frozen=True, kw_only=True)
class LoopTurns(DecodingChange):
    """Several turns of a loop with the frame before it, of which the second is the clip, cut within a latent frame."""

    count: int
    """Number of turns: two, or three for a decoder that also sees later frames."""
    shift: int
    """Number of frames between the end of a latent frame and the cut."""

    def list_frames(self, count: int) -> list[int]:
        """Return the frame before the loop and all turns."""
        return [0, *list(range(1, count)) * self.count]

    def cut(self, frames: UInt8[np.ndarray, "_ H W 3"]) -> UInt8[np.ndarray, "T H W 3"]:
        """Return the second turn, with the frame before it first."""
        length = len(frames) // self.count
        turn = np.roll(frames[1 + length : 1 + 2 * length], -self.shift, axis=0)
        return np.concatenate([turn[-1:], turn])
