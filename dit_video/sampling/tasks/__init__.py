"""Tasks on clips: each makes a request of what a user asks for, and the result of the sampled clip."""

from dit_video.sampling.tasks.clip_task import ClipTask
from dit_video.sampling.tasks.composite_task import AnyTask, CompositeTask
from dit_video.sampling.tasks.described_edit import DescribedEdit, EditMethod
from dit_video.sampling.tasks.extension import Blend, Extend
from dit_video.sampling.tasks.generation import Generate
from dit_video.sampling.tasks.interpolation import Interpolate
from dit_video.sampling.tasks.loop import Loop
from dit_video.sampling.tasks.regions import Inpaint, Outpaint
from dit_video.sampling.tasks.variation import Edit, Vary
from dit_video.sampling.tasks.zoom_out import ZoomOut

TASKS: dict[str, type[AnyTask]] = {
    "generate": Generate,
    "extend": Extend,
    "blend": Blend,
    "interpolate": Interpolate,
    "loop": Loop,
    "inpaint": Inpaint,
    "outpaint": Outpaint,
    "zoom_out": ZoomOut,
    "edit": Edit,
    "described_edit": DescribedEdit,
    "vary": Vary,
}
"""Tasks by the name of the pipeline's method, and of `sample.py --task`."""
