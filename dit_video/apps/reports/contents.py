"""Contents of a report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_video.core.errors import UserError
from dit_video.training.goodput import RunTimes
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A headline figure."""

    label: str
    """Name of the figure."""
    value: str
    """Formatted value with its unit: `98 %`."""
    note: str = ""
    """Additional information, such as an interval or the number of clips."""
    share: int | float | None = None
    """Figure as a share of its best value, 0..1, drawn as a bar; values outside are clipped."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A generated clip."""

    clip: Clip
    """Clip that was generated."""
    prompt: str | None = None
    """Prompt of the sample; by default the clip's caption."""
    seen: bool | None = None
    """True if the prompt occurred in training; None if that does not apply."""
    verdict: Mapping[str, bool] = field(default_factory=dict)
    """Judgement of each attribute, `{"colour": True}`; empty without a judge."""
    note: str = ""
    """Line of small print, such as the seed."""
    group: str = ""
    """Heading under which the page shows the sample, with others of its length."""


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A clip and its reconstruction by the autoencoder.

    Raises:
      UserError: the two differ in size.
    """

    original: Clip
    """Clip that was encoded."""
    decoded: Clip
    """Reconstruction by the autoencoder."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Values of metrics as text, by label: `{"PSNR": "31.2 dB"}`."""
    name: str = ""
    """Name of the clip; by default the original's caption."""
    linear: Clip | None = None
    """Reconstruction by the best linear autoencoder with as many latent values."""

    def __post_init__(self) -> None:
        for reconstruction in (self.decoded, self.linear):
            if reconstruction is not None and self.original.frames.shape != reconstruction.frames.shape:
                raise UserError(
                    f"a reconstruction of shape {reconstruction.frames.shape} differs from its original's, "
                    f"{self.original.frames.shape} [T H W 3]; compare clips before resizing them"
                )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values over steps.

    Raises:
      UserError: the numbers of steps and values differ.
    """

    name: str
    steps: tuple[int | float, ...]
    values: tuple[int | float, ...]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise UserError(
                f"curve {self.name!r} has {len(self.steps)} steps and {len(self.values)} values; use one step per value"
            )


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves with common axes; the value axis is logarithmic if the values span a decade."""

    title: str
    curves: tuple[Curve, ...]
    note: str = ""
    axis: str = "step"
    """Label of the axis of the curves' steps."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that the reader may copy."""

    text: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `write_report` shows, from top to bottom; empty parts have no section."""

    title: str
    summary: str = ""
    figures: tuple[Figure, ...] = ()
    samples: tuple[Sample, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    charts: tuple[Chart, ...] = ()
    charts_title: str = "Training"
    """Heading of the charts."""
    times: RunTimes = field(default_factory=RunTimes)
    """Where the time of the run went."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Nested metrics; the leaves are numbers, strings, booleans, `None` or sequences of them."""
    config: Any = None
    """JSON value of the experiment's config, from `configs.to_json`."""
    commands: tuple[Command, ...] = ()
