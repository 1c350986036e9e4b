"""Diffusion as pure functions: a process, an objective, samplers and guidance, on any `denoise(noisy, time)`."""

from dit_video.diffusion.grids import Even, FlowMatchGrid, SampleTimes, TimeGrid, UniPcGrid, time_grid
from dit_video.diffusion.guidance import classifier_free
from dit_video.diffusion.objective import Denoise, FlowMatching
from dit_video.diffusion.process import RectifiedFlow
from dit_video.diffusion.samplers import SAMPLERS, Euler, Heun, Sampler, advance, sample, sampler
from dit_video.diffusion.times import LogitNormal, Times, Uniform, low_discrepancy
from dit_video.diffusion.unipc import UniPc

__all__ = [
    "SAMPLERS",
    "Denoise",
    "Euler",
    "Even",
    "FlowMatchGrid",
    "FlowMatching",
    "Heun",
    "LogitNormal",
    "RectifiedFlow",
    "SampleTimes",
    "Sampler",
    "TimeGrid",
    "Times",
    "UniPc",
    "UniPcGrid",
    "Uniform",
    "advance",
    "classifier_free",
    "low_discrepancy",
    "sample",
    "sampler",
    "time_grid",
]
