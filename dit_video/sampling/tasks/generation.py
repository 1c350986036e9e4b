"""Generation of a clip from a prompt, images and keyframes."""

from collections.abc import Sequence
from dataclasses import dataclass

from dit_video.sampling.pictures import Condition, Image
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.clip_task import ClipTask
from dit_video.tokens import Grid


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
