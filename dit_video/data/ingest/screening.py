"""Screening of source files: into which shots a file is split, and which of them are kept.

`Screening` is the interface, and keeps every file whole. The one with steps (shot boundaries, measures, limits and
near-duplicates) is `dit_video.curation.screening.ScreeningConfig`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dit_video.video import VideoInfo, probe


class Borders(NamedTuple):
    """Black bars around a frame, in pixels."""

    top: int
    bottom: int
    left: int
    right: int

    def compute_area_share(self, height: int, width: int) -> float:
        """Return the share of the area of a frame of this size that the bars cover."""
        return 1 - (height - self.top - self.bottom) * (width - self.left - self.right) / (height * width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """A file, or a part of it without a cut; measures that were not requested are None."""

    name: str
    """Name of the file, followed by `#0`, `#1`, … if it has several shots."""
    start: float
    """Time of the first frame in seconds after the file's first frame."""
    frames: int
    """Number of frames."""
    fps: float
    """Average frame rate."""
    seconds: float
    """Time between the first and the last frame."""
    height: int
    """Height in pixels, as shown."""
    width: int
    """Width in pixels, as shown."""
    codec: str
    """Name of the video codec."""
    transfer: str = "sdr"
    """Transfer function: "sdr", or "pq" or "hlg" for HDR."""
    transparent: bool = False
    """Whether a pixel of the file is transparent."""
    motion: float | None = None
    """Average change of luma in levels of 255 per second."""
    black: float | None = None
    """Share of time in which the frame is black."""
    frozen: float | None = None
    """Share of time in which the frame stands still."""
    sharpness: float | None = None
    """Variance of the Laplacian in levels²."""
    letterbox: Borders | None = None
    """Black bars in pixels, as shown."""
    hash: tuple[int, ...] | None = None
    """Four perceptual hashes of 64 bits; None also if no frame has texture."""

    @staticmethod
    def of_file(name: str, facts: VideoInfo) -> "Shot":
        """Return the shot that is a whole file."""
        return Shot(name=name, start=0.0, **dataclasses.asdict(facts))

    @property
    def duration(self) -> float:
        """Return the seconds for which the shot is shown, including its last frame."""
        return self.seconds + 1 / self.fps

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Shot":
        """Return the shot whose fields are these JSON values."""
        letterbox = None if value["letterbox"] is None else Borders(*value["letterbox"])
        return Shot(**value | {"letterbox": letterbox, "hash": None if value["hash"] is None else tuple(value["hash"])})


class JudgedShot(NamedTuple):
    """A shot, with the reason why it is dropped, and the time until which it is shown."""

    shot: Shot
    reason: str
    """Rule that excludes the shot; empty if it is kept."""
    stop: float
    """Time in seconds after the file's first frame at which the next shot begins, or the file ends."""
    is_cut: bool = False
    """True for what is between shots: a transition, or a shot too short for a clip of its own, such as a flash."""


class ScreeningResult(NamedTuple):
    """Shots of a file, and the facts of the file."""

    shots: tuple[JudgedShot, ...]
    """Shots in their order: one begins where the one before it stops."""
    facts: VideoInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Screening:
    """The interface of screenings, which keeps every file whole; subclasses have steps, and their settings as fields.

    The fields are JSON values: a screening travels to worker processes as JSON, and the settings of a data set hold it.
    """

    def screen(self, encoded: bytes, name: str) -> ScreeningResult:
        """Return the shots of a file, decoding it once; every shot is either kept or dropped with a reason.

        Args:
          encoded: Bytes of the file.
          name: Name of the file, from which the names of its shots are made.

        Raises:
          DecodeError: If the file is damaged, or is not a readable video or image.
          UserError: If the screening cannot work for any file.
        """
        times: list[float] = []
        facts = probe(encoded, on_frame=lambda time, frame: times.append(time), is_exact=False)
        stop = max(times) + (1 / facts.fps if facts.frames > 1 else 0.0)
        return ScreeningResult((JudgedShot(Shot.of_file(name, facts), "", stop),), facts)

    def find_duplicates(self, hashes: Iterable[Sequence[int] | None], files: Iterable[int]) -> Mapping[int, int]:
        """Return the clips of a data set that are dropped as duplicates, each with the kept clip that it duplicates.

        Args:
          hashes: Hashes of every clip, as in its `Shot`.
          files: Number of every clip's file.
        """
        return {}
