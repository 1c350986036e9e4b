"""The interfaces of tasks on clips: of one sample, or of several samples or steps of their own."""

import abc
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.edit_paths import LatentStepper
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preview import PreviewDecoder
from dit_video.sampling.request import Request
from dit_video.tokens import Grid
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class ClipTask(abc.ABC):
    """A task: a request of a clip, and what becomes of the sampled clip. A subclass is a frozen dataclass."""

    prompt: str | None = None
    """Description of the result; None for the caption of the clip that it is made of."""

    @abc.abstractmethod
    def make_request(self, config: PipelineConfig) -> Request:
        """Return the request.

        Raises:
          UserError: If sizes, lengths or values do not fit the model or each other.
        """

    def get_prompt(self, clip: Clip) -> str:
        """Return the prompt, or the caption of a clip."""
        return clip.caption if self.prompt is None else self.prompt

    def finish(self, sampled: Clip) -> Clip:
        """Return the result, of the clip that was sampled for the request."""
        return sampled


@runtime_checkable
class TaskPipeline(Protocol):
    """The part of a pipeline that such tasks use."""

    config: PipelineConfig
    codec: LatentCodec
    preview_decoder: PreviewDecoder | None

    def run_tasks(self, *args: Any, **options: Any) -> list[Clip]:
        """Run tasks on clips: see `Pipeline.run_tasks`."""

    def make_stepper(self, *args: Any, **overrides: Any) -> LatentStepper:
        """Return the denoiser and Euler's solver for a request: see `Pipeline.make_stepper`."""


@dataclass(frozen=True, kw_only=True)
class CompositeTask(abc.ABC):
    """A task whose result takes several samples, or steps of its own. A subclass is a frozen dataclass."""

    prompt: str | None = None
    """Description of the result; None for the caption of the clip that it is made of."""

    @abc.abstractmethod
    def run(self, pipeline: TaskPipeline, **options: Any) -> Clip:
        """Return the result, sampled with options of `Pipeline.generate`.

        Raises:
          UserError: If values do not fit the model or each other.
        """


AnyTask = ClipTask | CompositeTask
"""A task of either kind."""


def get_size(clip: Clip) -> Grid:
    """Return the number of frames, height and width of a clip."""
    return Grid(*clip.frames.shape[:3])
