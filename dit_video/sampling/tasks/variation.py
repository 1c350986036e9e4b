"""Changes of a whole clip: SDEdit (arXiv 2108.01073) with another prompt, or with its own."""

from dataclasses import dataclass, replace

from dit_video.core.errors import UserError
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Request
from dit_video.sampling.tasks.clip_task import ClipTask, get_size
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Edit(ClipTask):
    """A clip that is changed to fit a prompt: noise is added to it, and taken away with the prompt."""

    clip: Clip
    strength: float = 0.8
    """Diffusion time, in (0, 1], that the clip is noised to; more changes it more."""

    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request that starts from the noisy clip."""
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength} is invalid: it must be above 0 and at most 1. Use 0.8")
        return Request(self.get_prompt(self.clip), get_size(self.clip), video=self.clip, strength=self.strength)

    def finish(self, sampled: Clip) -> Clip:
        """Return the sampled clip at the clip's frame rate."""
        return replace(sampled, fps=self.clip.fps)


@dataclass(frozen=True, kw_only=True)
class Vary(Edit):
    """A variation of a clip, for its own caption; every seed gives another."""

    strength: float = 0.7
    """Diffusion time, in (0, 1], that the clip is noised to; more changes it more."""
