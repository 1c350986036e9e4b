"""Diffusion as pure functions: a process, an objective, samplers and guidance, on any `denoise(noisy, time)`."""

from dit_video.diffusion.guidance import classifier_free
from dit_video.diffusion.objective import Denoise, FlowMatching
from dit_video.diffusion.process import RectifiedFlow
from dit_video.diffusion.samplers import SAMPLERS, Euler, Heun, Sampler, sample, sampler, time_grid
from dit_video.diffusion.times import LogitNormal, Times, Uniform, low_discrepancy

__all__ = [
    "SAMPLERS",
    "Denoise",
    "Euler",
    "FlowMatching",
    "Heun",
    "LogitNormal",
    "RectifiedFlow",
    "Sampler",
    "Times",
    "Uniform",
    "classifier_free",
    "low_discrepancy",
    "sample",
    "sampler",
    "time_grid",
]
