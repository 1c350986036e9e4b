"""Arrange a run's samples in a grid, as one looping image."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.video import Clip

_GAP = 2
_BACKGROUND = 255


def main(
    samples: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SAMPLES")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    columns: int = 12,
    frames: int = 17,
    scale: int = 2,
) -> None:
    """Arrange a run's samples of one length in a grid, in their order, as one looping image.

    For example:

        python tools/contact_sheet.py runs/quickstart/samples shapes.gif --columns 12 --scale 2
        python tools/contact_sheet.py runs/quickstart/samples images.png --frames 1

    Args:
        samples: Folder of samples, with prompts.json.
        out: File to write: gif, webp, apng, mp4, mov or webm; png or jpg for one frame.
        columns: Number of clips in a row of the grid.
        frames: Number of frames of the samples to show; others are skipped.
        scale: Integer factor by which frames are enlarged.
    """
    check_minimum(1, columns=columns, frames=frames, scale=scale)
    listed = open_clip_set(samples)
    clips = [clip for number in range(len(listed.names)) if len(clip := listed.read(number, None)) == frames]
    if not clips:
        raise UserError(
            f"--frames {frames} is invalid: {samples} has no samples of that length. Use --frames with a length it has"
        )
    height, width = max(clip.height for clip in clips) + _GAP, max(clip.width for clip in clips) + _GAP
    lines = -(-len(clips) // columns)
    sheet = np.full((frames, lines * height, columns * width, 3), _BACKGROUND, np.uint8)
    for number, clip in enumerate(clips):
        line, column = divmod(number, columns)
        top = line * height + (height - clip.height) // 2
        left = column * width + (width - clip.width) // 2
        sheet[:, top : top + clip.height, left : left + clip.width] = clip.frames
    Clip(frames=sheet.repeat(scale, axis=1).repeat(scale, axis=2), fps=clips[0].fps).save(out)
    print(f"{out}: {len(clips)} samples")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
