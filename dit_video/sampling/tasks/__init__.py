"""Tasks on clips: each makes a request of what a user asks for, and the result of the sampled clip."""

from dit_video.sampling.tasks.clip_task import AnyTask, ClipTask, CompositeTask
from dit_video.sampling.tasks.edit import DescribedEdit, Edit, EditMethod, Vary
from dit_video.sampling.tasks.extension import Blend, Extend, Interpolate
from dit_video.sampling.tasks.generation import Generate, Loop
from dit_video.sampling.tasks.regions import Inpaint, Outpaint, ZoomOut

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
