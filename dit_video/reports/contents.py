"""What a report shows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_video.core.errors import UserError
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A headline figure."""

    label: str
    value: str
    """as it is to be read, with its unit: `98 %`"""
    note: str = ""
    """what belongs to it: an interval, the number of clips"""
    share: int | float | None = None
    """the figure as a share of its best, 0..1, drawn as a bar; out of bounds is clipped to the bar"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A generated clip. Its prompt is the clip's caption, unless it is given."""

    clip: Clip
    prompt: str | None = None
    seen: bool | None = None
    """whether training had this prompt; `None` where the question does not arise"""
    verdict: Mapping[str, bool] = field(default_factory=dict)
    """a judge's answer for each attribute, `{"colour": True}`; empty without a judge"""
    note: str = ""
    """a line of small print, such as the seed"""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A clip and what the autoencoder makes of it.

    Raises:
      UserError: the two differ in size.
    """

    original: Clip
    decoded: Clip
    psnr: int | float
    """dB"""
    ssim: int | float | None = None
    name: str = ""
    """the original's caption, unless it is given"""
    linear: Clip | None = None
    """what the best linear autoencoder of as many latent values makes of it"""
    linear_psnr: int | float | None = None

    def __post_init__(self) -> None:
        for made in (self.decoded, self.linear):
            if made is not None and self.original.frames.shape != made.frames.shape:
                raise UserError(
                    f"a reconstruction has its original's size, {self.original.frames.shape} [T H W 3], and this one "
                    f"is {made.frames.shape}; compare before resizing"
                )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value over steps.

    Raises:
      UserError: there are not as many steps as values.
    """

    name: str
    steps: tuple[int | float, ...]
    values: tuple[int | float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise UserError(
                f"curve {self.name!r} has {len(self.steps)} steps and {len(self.values)} values; give one step a value"
            )


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves that share their axes. The value axis is logarithmic where the values span a decade."""

    title: str
    curves: tuple[Curve, ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that the reader may copy."""

    text: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `write_report` shows, top to bottom. A part that is empty has no section."""

    title: str
    summary: str = ""
    figures: tuple[Figure, ...] = ()
    samples: tuple[Sample, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    charts: tuple[Chart, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """nested; the leaves are numbers, strings, booleans, `None` or sequences of them"""
    config: Any = None
    """a JSON value: `configs.to_json` of the experiment"""
    commands: tuple[Command, ...] = ()
