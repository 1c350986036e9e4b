"""Anonymous copies of samples, and copies of worse quality for control questions."""

from dataclasses import replace
from pathlib import Path

import av

from dit_video.core import rng
from dit_video.core.errors import DecodeError
from dit_video.evaluation.distortions import distort
from dit_video.video import Clip, decode

_BLUR = 1 / 16
"""Standard deviation of the blur of a degraded copy, in parts of the shorter side."""
_NOISE = 32
"""Standard deviation of its noise, of 255."""


def copy_sample(source: Path, target: Path) -> None:
    """Copy a sample without what its file says about itself, such as how and with which weights it was sampled.

    Pixels do not change: the packets of a video are copied, and an image is written again without loss.

    Raises:
      DecodeError: the file is damaged.
    """
    if source.suffix.lower() == ".png":
        replace(decode(source), recipe={}).save(target)
        return
    # The version of the program that wrote a file would distinguish a sample from its degraded copy; files of
    # `Clip.save` have none. The index of an mp4 comes first, so that a browser plays it before all is loaded.
    options = {"fflags": "+bitexact"}
    if source.suffix.lower() == ".mp4":
        options["movflags"] = "+faststart"
    try:
        with av.open(str(source)) as container, av.open(str(target), "w", options=options) as output:
            stream = container.streams.video[0]
            copy = output.add_stream_from_template(stream)
            copy.metadata.clear()
            for packet in container.demux(stream):
                if packet.dts is not None:  # the last packet is empty
                    packet.stream = copy
                    output.mux(packet)
    except (av.error.FFmpegError, IndexError) as error:
        raise DecodeError(f"{source} cannot be decoded ({error}); sample it again") from error


def degrade(clip: Clip, *, seed: int) -> Clip:
    """Return a copy that everybody who looks prefers the clip to: blurred, and with noise that differs by frame."""
    generator = rng.make_generator(seed, "degraded copy")
    blurred = distort(clip, "blur", max(1.0, _BLUR * min(clip.height, clip.width)), generator)
    return Clip(frames=distort(blurred, "noise", _NOISE, generator).frames, fps=clip.fps)


def write_degraded(source: Path, target: Path, *, seed: int) -> None:
    """Write a degraded copy of a sample's file."""
    degrade(decode(source), seed=seed).save(target)
