"""The interface of tasks that sample several times, or that take steps of their own."""

import abc
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from dit_video.data.latents.codec import LatentCodec
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.preview import PreviewDecoder
from dit_video.sampling.stepper import LatentStepper
from dit_video.sampling.tasks.clip_task import ClipTask
from dit_video.video import Clip


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
          UserError: values that do not fit the model or each other.
        """


AnyTask = ClipTask | CompositeTask
"""A task of either kind."""
