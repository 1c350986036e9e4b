"""Fields of the studio's forms: their descriptions for the page, and the values that a browser's answers stand for."""

import abc
import base64
import binascii
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.tokens import Grid
from dit_video.video import Clip

MAX_TEXT = 10_000
"""Maximum number of characters of a text."""
_MAX_MASK_BYTES = 8 << 20
_PNG_URL = "data:image/png;base64,"


class FormError(UserError):
    """An answer to a form that is refused.

    Args:
      message: text for the user.
      field: name of the field whose answer it is, if it is that of one.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


@runtime_checkable
class MediaSource(Protocol):
    """The uploads and the gallery of a user."""

    def open_clip(self, reference: Mapping[str, Any]) -> Clip:
        """Return the clip of `{"upload": ID}` or `{"item": ID}`.

        Raises:
          UserError: there is none of this user.
        """

    def fit_image(self, image: Clip) -> Clip:
        """Return an image at a size that the model can sample."""


@dataclass(frozen=True, kw_only=True)
class FormField(abc.ABC):
    """An input of a form."""

    kind: ClassVar[str]
    name: str
    title: str
    help: str = ""
    is_required: bool = False
    default: Any = None
    """Value that the page begins with; None for an empty input."""

    def describe(self) -> dict[str, Any]:
        """Return the description that the page makes the input of, as JSON values."""
        described = {"name": self.name, "title": self.title, "help": self.help, "kind": self.kind}
        return described | {"required": self.is_required, "default": self.default} | self._describe_kind()

    def _describe_kind(self) -> dict[str, Any]:
        return {}

    def parse(self, answers: Mapping[str, Any], media: MediaSource) -> Any:
        """Return the value of this field's answer among those of a form; None for an empty one.

        Raises:
          FormError: no answer to a required field, or one that is invalid.
        """
        answer = answers.get(self.name)
        if answer is None or answer == "":
            if self.is_required:
                raise FormError(f"{self.title} is missing: this task needs it. Choose or enter one.", self.name)
            return None
        try:
            return self._parse_answer(answer, media)
        except FormError:
            raise
        except UserError as error:
            raise FormError(str(error), self.name) from error

    @abc.abstractmethod
    def _parse_answer(self, answer: Any, media: MediaSource) -> Any: ...

    def _refuse(self, rule: str) -> FormError:
        return FormError(f"{self.title} is invalid: {rule}.", self.name)


@dataclass(frozen=True, kw_only=True)
class TextField(FormField):
    """A text of one or several lines."""

    kind = "text"
    lines: int = 1

    def _describe_kind(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def _parse_answer(self, answer: Any, media: MediaSource) -> str:
        if not isinstance(answer, str):
            raise self._refuse("it must be a text")
        if len(answer) > MAX_TEXT:
            raise self._refuse(f"it has {len(answer)} characters. Use at most {MAX_TEXT}")
        return answer.strip()


@dataclass(frozen=True, kw_only=True)
class NumberField(FormField):
    """A number, which may have to be whole."""

    kind = "number"
    minimum: float | int | None = None
    maximum: float | int | None = None
    step: float | int | None = None
    """Distance of the numbers that the page's arrows lead to."""
    is_whole: bool = False

    def _describe_kind(self) -> dict[str, Any]:
        return {"min": self.minimum, "max": self.maximum, "step": self.step, "is_whole": self.is_whole}

    def _parse_answer(self, answer: Any, media: MediaSource) -> float | int:
        if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
            raise self._refuse("it must be a number")
        if self.is_whole and answer != int(answer):
            raise self._refuse(f"{answer} is not a whole number. Use {math.floor(answer)} or {math.ceil(answer)}")
        low, high = self.minimum, self.maximum
        if (low is not None and answer < low) or (high is not None and answer > high):
            limits = [f"at least {low}" if low is not None else "", f"at most {high}" if high is not None else ""]
            raise self._refuse(f"{answer} is out of range. Use {' and '.join(filter(None, limits))}")
        return int(answer) if self.is_whole else float(answer)


@dataclass(frozen=True, kw_only=True)
class ChoiceField(FormField):
    """One of several values."""

    kind = "choice"
    choices: tuple[tuple[str, str], ...]
    """Values and their titles."""

    def _describe_kind(self) -> dict[str, Any]:
        return {"choices": [{"value": value, "title": title} for value, title in self.choices]}

    def _parse_answer(self, answer: Any, media: MediaSource) -> str:
        values = [value for value, _ in self.choices]
        if answer not in values:
            raise self._refuse(f"{str(answer)[:40]!r} is no choice. Use {', '.join(filter(None, values))}")
        return answer


@dataclass(frozen=True, kw_only=True)
class FlagField(FormField):
    """A check box."""

    kind = "flag"

    def _parse_answer(self, answer: Any, media: MediaSource) -> bool:
        if not isinstance(answer, bool):
            raise self._refuse("it must be true or false")
        return answer


@dataclass(frozen=True, kw_only=True)
class SizeField(FormField):
    """Frames, height and width of a clip, or height and width alone."""

    kind = "size"
    steps: Grid
    """Distances of the numbers that the model can sample."""
    presets: tuple[Grid, ...]
    has_frames: bool = True
    frames_offset: int = 1
    """Remainder of the number of frames: 1 for `1 + k * steps.t`, 0 for multiples."""

    def _describe_kind(self) -> dict[str, Any]:
        return {
            "default": None if self.default is None else _describe_size(self.default),
            "steps": _describe_size(self.steps),
            "presets": [{"title": f"{size.w} × {size.h}", **_describe_size(size)} for size in self.presets],
            "axes": ["frames", "height", "width"] if self.has_frames else ["height", "width"],
            "frames_offset": self.frames_offset,
        }

    def _parse_answer(self, answer: Any, media: MediaSource) -> tuple[int, ...]:
        names = ("frames", "height", "width") if self.has_frames else ("height", "width")
        values: list[Any] = [answer.get(name) for name in names] if isinstance(answer, Mapping) else [None]
        if not all(type(value) is int and 0 < value < 100_000 for value in values):
            raise self._refuse(f"{', '.join(names)} must be whole numbers above 0")
        return tuple(values)


@dataclass(frozen=True, kw_only=True)
class ClipField(FormField):
    """A clip that was uploaded, or one of the gallery."""

    kind = "clip"

    def _parse_answer(self, answer: Any, media: MediaSource) -> Clip:
        if not isinstance(answer, Mapping):
            raise self._refuse("it must name an upload or a clip of the gallery")
        return media.open_clip(answer)


@dataclass(frozen=True, kw_only=True)
class ImageField(ClipField):
    """An image that was uploaded, or a frame of a clip."""

    kind = "image"
    is_fitted: bool = False
    """True to fit the image to a size that the model can sample; otherwise the task does."""

    def _parse_answer(self, answer: Any, media: MediaSource) -> Clip:
        clip = super()._parse_answer(answer, media)
        frame, count = answer.get("frame", 0), len(clip.frames)
        if type(frame) is not int or not -count <= frame < count:
            raise self._refuse(f"frame {str(frame)[:20]} does not exist. Use 0 to {count - 1}")
        image = Clip(clip.frames[frame][None], fps=1, caption=clip.caption)
        return media.fit_image(image) if self.is_fitted else image


@dataclass(frozen=True, kw_only=True)
class MaskField(FormField):
    """A region, drawn over the first frame of a clip."""

    kind = "mask"
    clip_name: str
    """Name of the field of the clip."""

    def _describe_kind(self) -> dict[str, Any]:
        return {"of": self.clip_name}

    def _parse_answer(self, answer: Any, media: MediaSource) -> Bool[np.ndarray, "H W"]:
        url = answer.get("png") if isinstance(answer, Mapping) else None
        if not isinstance(url, str) or not url.startswith(_PNG_URL) or len(url) > _MAX_MASK_BYTES:
            raise self._refuse("it must be a PNG picture")
        return self._decode(url.removeprefix(_PNG_URL)) > 127

    def _decode(self, text: str) -> np.ndarray:
        from PIL import Image  # Imported here: a server that starts needs no image library yet.

        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
                if max(image.size) > 8192:
                    raise self._refuse("it has more than 8192 pixels on a side")
                return np.asarray(image.convert("L"))
        except (OSError, ValueError, SyntaxError, binascii.Error) as error:
            raise self._refuse("it is not a readable PNG picture") from error


def _describe_size(size: Grid) -> dict[str, int]:
    return {"frames": size.t, "height": size.h, "width": size.w}
