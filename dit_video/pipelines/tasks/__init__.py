"""Tasks on clips: each makes a request of what a user asks for, and the result of the sampled clip."""

from dit_video.pipelines.tasks.clip_task import ClipTask
from dit_video.pipelines.tasks.extension import Blend, Extend
from dit_video.pipelines.tasks.generation import Generate
from dit_video.pipelines.tasks.interpolation import Interpolate
from dit_video.pipelines.tasks.loop import Loop
from dit_video.pipelines.tasks.regions import Inpaint, Outpaint
from dit_video.pipelines.tasks.variation import Edit, Vary

TASKS: dict[str, type[ClipTask]] = {
    "generate": Generate,
    "extend": Extend,
    "blend": Blend,
    "interpolate": Interpolate,
    "loop": Loop,
    "inpaint": Inpaint,
    "outpaint": Outpaint,
    "edit": Edit,
    "vary": Vary,
}
"""Tasks by the name of the pipeline's method, and of `sample.py --task`."""
