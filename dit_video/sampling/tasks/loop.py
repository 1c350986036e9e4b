"""Seamless loops."""

from dataclasses import dataclass, replace

from dit_video.core.errors import UserError
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.clip_task import ClipTask
from dit_video.sampling.tasks.seamless_loop import SeamlessLoop
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Loop(ClipTask):
    """A clip whose first frame follows its last."""

    size: tuple[int, int, int] | None = None
    """Frames, height and width; frames are a multiple of the temporal stride. None for one frame less than the model's
    own size."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request of a clip with a further first frame, which is that before the loop: its last."""
        stride = config.autoencoder.stride.t
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
