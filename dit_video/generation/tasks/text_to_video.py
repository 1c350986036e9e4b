"""Text to video: clips from a prompt alone, also by models that were trained with images."""

from dataclasses import dataclass

from dit_video.generation.plan import SamplingPlan
from dit_video.generation.request import GenerationTask, Request, TaskModel
from dit_video.generation.tasks.image_to_video import plan_frames


@dataclass(frozen=True, kw_only=True)
class TextToVideo(GenerationTask):
    """Clips from a prompt."""

    def __call__(self, request: Request, model: TaskModel) -> SamplingPlan:
        """Return the plan without images.

        Raises:
          UserError: the model needs an image, or the request has some.
        """
        request.check_pictures(())
        return plan_frames({}, request, model)
