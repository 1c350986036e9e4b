"""Tasks: what is generated from what. Each makes a request, and the result of the sampled clip."""

from dit_video.sampling.tasks.edit import DescribedEdit, Edit, Vary
from dit_video.sampling.tasks.extension import Blend, Extend, Interpolate
from dit_video.sampling.tasks.fields import Doc, Limits, OneFrame
from dit_video.sampling.tasks.generation import Generate, Loop
from dit_video.sampling.tasks.regions import Inpaint, Outpaint, ZoomOut
from dit_video.sampling.tasks.task import Prompt, Task

TASKS: dict[str, type[Task]] = {
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
"""Tasks by the names that `sample.py`, task files and the studio have for them; one more line adds another."""


def get_task_name(task: Task) -> str:
    """Return the name of a task in `TASKS`, or that of its class."""
    return next((name for name, kind in TASKS.items() if kind is type(task)), type(task).__name__)
