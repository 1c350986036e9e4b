"""Options of a generation task of `sample.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_video.core.command_line import parse_size
from dit_video.core.errors import UserError
from dit_video.sampling.tasks.task_file import TaskEntry, make_task

TaskName = Literal[
    "generate",
    "extend",
    "blend",
    "interpolate",
    "loop",
    "inpaint",
    "outpaint",
    "zoom_out",
    "edit",
    "described_edit",
    "vary",
]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Task on a clip, for --task alone; with --prompts each entry of the list has its own values."""

    clip: Path | None = None
    """Clip that is extended, interpolated, inpainted, outpainted, edited or varied."""
    first: Path | None = None
    """First of two clips that are blended."""
    second: Path | None = None
    """Second of two clips that are blended."""
    new_frames: int | None = None
    """Number of new frames of extend, blend and zoom_out."""
    before: bool | None = None
    """Extend a clip before its first frame."""
    overlap: int | None = None
    """Number of known frames that the model gets in extend and blend."""
    factor: float | None = None
    """Number of intervals that every interval becomes in interpolate; factor of the zoom in zoom_out."""
    source: str | None = None
    """Description of the clip, of described_edit."""
    edit_method: Literal["flow_edit", "inversion"] | None = None
    """Method of described_edit."""

    def make_entry(
        self, name: str, *, prompt: str | None, size: str | None, seed: int, pictures: dict[str, Any]
    ) -> TaskEntry:
        """Return the task that the options describe.

        Args:
          name: Name of the task.
          prompt: Description of the result.
          size: Frames, height and width, or for outpainting height and width.
          seed: Seed of the noise.
          pictures: Files of `image`, `last_image`, `mask` and `conditions`, and `strength`.
        """
        values = {key: value for key, value in vars(self).items() if value is not None}
        if "new_frames" in values:
            values["frames"] = values.pop("new_frames")
        values |= {key: value for key, value in pictures.items() if value}
        if name == "interpolate" and "factor" in values:
            values["factor"] = int(values["factor"])
        if size is not None:
            values["size"] = _parse_plane(size) if name == "outpaint" else parse_size(size)
        named = {"seed": seed} if prompt is None else {"prompt": prompt, "seed": seed}
        return make_task(name, values | named, Path())


def _parse_plane(size: str) -> tuple[int, int]:
    """Return a height and width, such as 64x64."""
    parts = size.split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UserError(f"--size {size} is invalid: outpaint needs a height and width. Use --size 64x64")
    return int(parts[0]), int(parts[1])
