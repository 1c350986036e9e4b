"""The interface of annotators, which compute columns of a data set from its clips, or from other columns."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from dit_video.core.errors import UserError
from dit_video.core.grid import Grid
from dit_video.data.clips import ClipInfo
from dit_video.video import Clip, decode


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column that an annotator computes."""

    type: pa.DataType
    description: str
    unit: str = ""


class AnnotationError(UserError):
    """A clip that an annotator has no values for, with the reason. Its values are null, and other clips follow."""


@dataclass(frozen=True)
class ClipFile:
    """A clip that an annotator reads: its file, and what is known of it."""

    info: ClipInfo
    content: bytes

    def decode_frames(self, count: int, *, max_side: int | None = None) -> Clip:
        """Return up to `count` frames at even spacing, the first and last half a step from the ends of the clip.

        Args:
          count: Maximum number of frames; all those of a shorter clip are returned.
          max_side: Maximum height and width in pixels, to which larger frames are shrunk; None for the native size.

        Raises:
          DecodeError: If the file is damaged.
        """
        info, count = self.info, min(count, self.info.frames)
        shrink = 1.0 if max_side is None else min(1.0, max_side / max(info.height, info.width))
        size = Grid(count, max(1, round(info.height * shrink)), max(1, round(info.width * shrink)))
        options: dict[str, Any] = {"frames": count} if shrink == 1.0 else {"size": size}
        if info.frames == count or not info.seconds:
            return decode(self.content, **options)
        step = info.seconds / count
        return decode(self.content, start=step / 2, fps=1 / step, **options)


class ServiceCost(NamedTuple):
    """ServiceCost of a service."""

    text: str
    """Description, empty if there is no service."""
    price: float | None
    """Price in the currency of the prices; None if it is unknown."""


class _NamedColumns(abc.ABC):
    """The fields and identity that every annotator has."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Return the name of the file of columns."""

    @property
    @abc.abstractmethod
    def columns(self) -> Mapping[str, Column]:
        """Return the columns by name."""

    @property
    @abc.abstractmethod
    def identity(self) -> str:
        """Return a text that names all but the clips that values depend on: version, settings, hash of weights.

        Values of another identity are computed again.
        """


class Annotator(_NamedColumns):
    """Columns that are a function of each clip alone. Settings are fields; threads share an annotator."""

    threads: ClassVar[int] = 2
    """Number of clips that are annotated at once."""
    block_clips: ClassVar[int] = 256
    """Number of clips whose values are written together."""

    @property
    def reads_captions(self) -> bool:
        """Return True if values depend on the captions, and are computed again for a clip whose captions change."""
        return False

    @abc.abstractmethod
    def annotate(self, clip: ClipFile) -> Mapping[str, Any]:
        """Return the values of a clip; None for what does not exist, such as the motion of an image.

        Raises:
          AnnotationError, DecodeError: this clip has no values.
          UserError: If no clip can be annotated, as when a server is not reached.
        """

    def check(self) -> None:  # most need nothing
        """Check, before any clip is read, that the annotator can run.

        Raises:
          UserError: If a package, weights or a key are missing.
        """

    def estimate_cost(self, infos: Sequence[ClipInfo]) -> "ServiceCost":
        """Return what the values of these clips cost."""
        return ServiceCost("", 0.0)

    def summarize(self) -> str:
        """Return a line about the work done, such as its cost; empty for none."""
        return ""


class TableAnnotator(_NamedColumns):
    """Columns that are a function of other columns of all clips."""

    @property
    @abc.abstractmethod
    def needs(self) -> Mapping[str, str]:
        """Return the columns that are read, each with the annotator that computes it."""

    @abc.abstractmethod
    def annotate_table(self, names: list[str], columns: Mapping[str, pa.ChunkedArray]) -> Mapping[str, Any]:
        """Return the values of all clips, given their names and the needed columns."""


AnyAnnotator = Annotator | TableAnnotator
