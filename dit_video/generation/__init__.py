"""Generation of clips: requests, tasks, packing and the sampler."""

from dit_video.generation.packing import SamplingRequest
from dit_video.generation.request import GenerationTask, Image, Request, SamplingPlan, TaskModel
from dit_video.generation.sampler import (
    Denoiser,
    LatentTrace,
    Sampling,
    draw_initial_noise,
    sample_latents,
    trace_latents,
)
from dit_video.generation.tasks.image_to_video import ImageToVideo
from dit_video.generation.tasks.text_to_video import TextToVideo
from dit_video.generation.transform import CleanTokens, StepInputs, StepTransform

__all__ = [
    "CleanTokens",
    "Denoiser",
    "GenerationTask",
    "Image",
    "ImageToVideo",
    "LatentTrace",
    "Request",
    "Sampling",
    "SamplingPlan",
    "SamplingRequest",
    "StepInputs",
    "StepTransform",
    "TaskModel",
    "TextToVideo",
    "draw_initial_noise",
    "sample_latents",
    "trace_latents",
]
