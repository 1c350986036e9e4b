"""Forms of the studio: a tab for every task of `sampling.tasks`, with an input for every field of its class.

A task that is added to `TASKS` has a tab without a line here. Inputs describe themselves to the page, and parse what a
browser answers.
"""

import abc
import base64
import binascii
import inspect
import io
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.core.registry import load_entry_points
from dit_video.diffusion import SOLVERS, TEXT
from dit_video.sampling.completion import choose_conditioner
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import Condition
from dit_video.sampling.tasks import TASKS, Task
from dit_video.sampling.tasks.fields import TaskField, list_fields, list_required
from dit_video.tokens import Grid
from dit_video.video import Clip

MAX_TEXT = 10_000
"""Maximum number of characters of a text."""
_MAX_MASK_BYTES = 8 << 20
_PNG_URL = "data:image/png;base64,"


class FormError(UserError):
    """An answer to a form that is refused.

    Args:
      message: Text for the user.
      field: Name of the field with this answer; None for none.
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
          UserError: If this user has no such clip.
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
        """Return the value of this field's answer; None for an empty one.

        Raises:
          FormError: If a required field has no answer, or the answer is invalid.
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
    above: float | int | None = None
    """Number that it must exceed, where there is no minimum."""
    maximum: float | int | None = None
    step: float | int | None = None
    """Distance of the numbers that the page's arrows lead to."""
    is_whole: bool = False

    def _describe_kind(self) -> dict[str, Any]:
        limits = {"min": self.minimum, "above": self.above, "max": self.maximum}
        return limits | {"step": self.step, "is_whole": self.is_whole}

    def _parse_answer(self, answer: Any, media: MediaSource) -> float | int:
        if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
            raise self._refuse("it must be a number")
        if self.is_whole and answer != int(answer):
            raise self._refuse(f"{answer} is not a whole number. Use {math.floor(answer)} or {math.ceil(answer)}")
        rules = [
            ("at least", self.minimum, operator.ge),
            ("more than", self.above, operator.gt),
            ("at most", self.maximum, operator.le),
        ]
        given = [(words, limit, is_within) for words, limit, is_within in rules if limit is not None]
        if not all(is_within(answer, limit) for _, limit, is_within in given):
            limits = " and ".join(f"{words} {limit}" for words, limit, _ in given)
            raise self._refuse(f"{answer} is out of range. Use {limits}")
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
class ImagesField(FormField):
    """Several images, each as in `ImageField`."""

    kind = "images"

    def _parse_answer(self, answer: Any, media: MediaSource) -> tuple[Any, ...] | None:
        if not isinstance(answer, list) or not all(isinstance(each, Mapping) for each in answer):
            raise self._refuse("it must be a list of images")
        if len(answer) > MAX_IMAGES:
            raise self._refuse(f"it has {len(answer)} images. Use at most {MAX_IMAGES}")
        image = ImageField(name=self.name, title=self.title)
        return tuple(self._parse_image(each, image._parse_answer(each, media)) for each in answer) or None

    def _parse_image(self, answer: Mapping[str, Any], image: Clip) -> Any:
        return image


@dataclass(frozen=True, kw_only=True)
class KeyframesField(ImagesField):
    """Images at frames of the clip, which are numbered from 0, each with its strength."""

    kind = "keyframes"

    def _parse_image(self, answer: Mapping[str, Any], image: Clip) -> Condition:
        at, strength = answer.get("at", 0), answer.get("strength", 1)
        if type(at) is not int or not 0 <= at < 100_000:
            raise self._refuse(f"frame {str(at)[:20]} does not exist. Use one from 1")
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
            raise self._refuse("a strength is above 0 and at most 1")
        return Condition(content=image, frame=at, strength=strength)


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


MAX_COUNT = 4
"""Maximum number of clips of one job."""
MAX_SEED = 2**32 - 1 - MAX_COUNT
_MAX_WHOLE = 1000
"""Maximum of a whole number of a task without a maximum of its own."""
_PICTURE_TABS = {
    "text_to_video": ("Text to video", ("prompt", "size")),
    "image_to_video": ("Image to video", ("prompt", "image", "size")),
    "first_and_last_frame": ("First and last frame", ("prompt", "image", "last_image", "size")),
    "keyframes": ("Keyframes", ("prompt", "conditions", "size")),
    "control": ("Control", ("prompt", "control", "reference_images", "size")),
}
"""Tabs of the task `generate`: titles, and the fields that each of them shows. A model that does not use one of them
lacks the tab."""
_OPTIONAL = ("reference_images",)
"""Fields without which a tab is shown, too, for models that do not use them."""
OPTION_FIELDS: dict[str, FormField] = {
    each.name: each
    for each in (
        ClipField(name="control", title="Control", help="Poses, depth or edges that the clip follows."),
        ImagesField(name="reference_images", title="References", help="Images of subjects that the clip shows."),
    )
}
"""Fields of options of requests, which no task has."""
MAX_IMAGES = 8
"""Maximum number of images of a field."""
_TAB_HELP = {
    "text_to_video": "A clip from a description.",
    "image_to_video": "A clip that begins with an image.",
    "first_and_last_frame": "A clip between two images.",
    "keyframes": "A clip that shows images at some of its frames.",
    "control": "A clip that follows another one, or shows subjects of images.",
}
_TAB_TITLES = {"described_edit": ("Edit by description", "A clip that changes by the difference of two descriptions.")}
"""Titles and sentences of tasks whose names or docstrings say too little."""
_REQUIRED = frozenset({"image", "last_image", "size"})
"""Fields that are required where they are shown, though the task can do without."""
_TRAINING_FREE = (
    "This model was not trained with known frames. They are kept by replacing their latents in every step "
    "(training-free), which follows them less smoothly than a model that was trained for it."
)


@dataclass(frozen=True, kw_only=True)
class Tab:
    """A tab of the studio: a task and its form."""

    name: str
    title: str
    help: str
    task_name: str
    """Name of the task in `TASKS`."""
    fields: tuple[FormField, ...]
    note: str = ""
    """Sentence about what this model does differently; empty for none."""

    @property
    def options(self) -> frozenset[str]:
        """Return the names of `OPTION_FIELDS` that are no fields of the task."""
        return frozenset(OPTION_FIELDS) - {field.name for field in list_fields(TASKS[self.task_name])}

    @property
    def has_known_pixels(self) -> bool:
        """Return whether the task keeps pixels of the form's clips or images."""
        kinds = {field.kind for field in self.fields}
        return TASKS[self.task_name].is_completion and not kinds.isdisjoint(("clip", "image", "keyframes"))

    def describe(self) -> dict[str, Any]:
        """Return the description that the page makes the tab of, as JSON values."""
        described = [field.describe() for field in self.fields]
        return {"name": self.name, "title": self.title, "help": self.help, "note": self.note, "fields": described}

    def parse(self, answers: Any, media: MediaSource) -> dict[str, Any]:
        """Return the values of the task.

        Raises:
          FormError: If an answer is invalid, or its field does not exist.
        """
        return parse_answers(self.fields, answers, media)

    def make_task(self, values: Mapping[str, Any]) -> Task:
        """Return the task with those of these values that are its own."""
        return TASKS[self.task_name](**{name: value for name, value in values.items() if name not in self.options})


def parse_answers(form: Sequence[FormField], answers: Any, media: MediaSource) -> dict[str, Any]:
    """Return the values of a form's answers, without empty ones.

    Raises:
      FormError: If an answer is invalid, or its field does not exist.
    """
    if not isinstance(answers, Mapping):
        raise FormError("the answers of a form must be an object")
    if unknown := sorted(set(answers) - {field.name for field in form}):
        raise FormError(f"{str(unknown[0])[:40]!r} is no field of this form. Reload the page.")
    values = {field.name: field.parse(answers, media) for field in form}
    return {name: value for name, value in values.items() if value is not None}


def make_tabs(config: PipelineConfig) -> tuple[Tab, ...]:
    """Return the tabs for a model: several of generation, and one for every other task.

    A task with a required field that no form has an input for has no tab.
    """
    load_entry_points()
    tabs: list[Tab] = []
    accepted = choose_conditioner(config.conditioner, config.model.backbone).accepted
    for name, (title, names) in _PICTURE_TABS.items():
        if not set(names) - {"prompt", "size", *_OPTIONAL} <= set(accepted):
            continue
        shown = [each for each in names if each in accepted or each not in _OPTIONAL]
        form = make_form("generate", config, names=shown)
        tabs.append(Tab(name=name, title=title, help=_TAB_HELP[name], task_name="generate", fields=form))
    for name, task in TASKS.items():
        if name != "generate":
            own_title, first_line = name.replace("_", " ").capitalize(), (inspect.getdoc(task) or "").partition("\n")[0]
            title, help = _TAB_TITLES.get(name, (own_title, first_line))
            form = make_form(name, config)
            if set(list_required(task)) <= {field.name for field in form}:
                tabs.append(Tab(name=name, title=title, help=help, task_name=name, fields=form))
    if config.model.frame_conditioning is not None or config.conditioner is not None:
        return tuple(tabs)
    return tuple(replace(tab, note=_TRAINING_FREE) if tab.has_known_pixels else tab for tab in tabs)


def make_form(task_name: str, config: PipelineConfig, *, names: Sequence[str] = ()) -> tuple[FormField, ...]:
    """Return the inputs of a task, made of the fields of its class; lists have none.

    Args:
      task_name: Name of the task in `TASKS`.
      config: Config of the model, which the defaults fit.
      names: Names of the fields, in order; all by default, clips first.
    """
    kind = TASKS[task_name]
    suggested = kind.suggest(config)
    chosen = [field for field in list_fields(kind) if not names or field.name in names]
    clip_name = next((field.name for field in chosen if field.kind in ("clip", "image")), "")
    made = (_make_field(field, suggested.get(field.name, field.default), config, clip_name) for field in chosen)
    form = [each for each in made if each is not None]
    form += [OPTION_FIELDS[name] for name in names if name in OPTION_FIELDS]
    if names:
        return tuple(sorted(form, key=lambda each: names.index(each.name)))
    return tuple(sorted(form, key=lambda each: each.kind not in ("clip", "image")))


def _make_field(field: TaskField, default: Any, config: PipelineConfig, clip_name: str) -> FormField | None:
    """Return the input of a task's field, where a mask is that of the clip of a name; None if it has none."""
    shared: dict[str, Any] = {
        "name": field.name,
        "title": field.title,
        "help": "" if field.doc.text == f"{field.title}." else field.doc.text,
        "is_required": field.is_required or field.name in _REQUIRED,
    }
    match field.kind:
        case "text":
            return TextField(**(shared | {"help": ""} if field.name == "prompt" else shared), default=default, lines=2)
        case "mask":
            help = "The region is the same in all frames."
            return MaskField(**(shared | {"help": help}), clip_name=clip_name)
        case "size" | "plane":
            return _make_size_field(shared, default or config.size, config)
        case "image":
            # Those of `generate` are fitted to its size.
            return ImageField(**shared, is_fitted=field.is_required)
        case "clip":
            return ClipField(**shared)
        case "conditions":
            texts = {"title": "Keyframes", "help": "Images that the clip shows at these frames, counted from 1."}
            return KeyframesField(**(shared | texts | {"is_required": True}))
        case "whole" | "number":
            return _make_number_field(field, shared, default)
        case "flag":
            return FlagField(**shared, default=default)
        case "choice":
            choices = tuple((value, value.replace("_", " ")) for value in field.choices)
            return ChoiceField(**shared, default=default, choices=choices)
        case _:
            return None


def _make_number_field(field: TaskField, shared: Mapping[str, Any], default: float | None) -> NumberField:
    limits, is_whole = field.limits, field.kind == "whole"
    most = _MAX_WHOLE if is_whole and limits.maximum is None else limits.maximum
    bounds: dict[str, Any] = {"minimum": limits.minimum, "above": limits.above, "maximum": most, "step": limits.step}
    return NumberField(**shared, default=default, is_whole=is_whole, **bounds)


def _make_size_field(shared: Mapping[str, Any], default: Grid | tuple[int, int], config: PipelineConfig) -> SizeField:
    """Return the input of frames, height and width, or of height and width."""
    steps, presets = get_size_steps(config), list_presets(config)
    shared = {**shared, "help": ""}
    if len(default) == 2:
        return SizeField(**shared, default=Grid(config.size.t, *default), steps=steps, presets=(), has_frames=False)
    frames = default[0]
    sizes = tuple(size._replace(t=frames) for size in presets)
    return SizeField(**shared, default=default, steps=steps, presets=sizes, frames_offset=frames % steps.t)


def get_size_steps(config: PipelineConfig) -> Grid:
    """Return the distances of the numbers of frames, heights and widths that a model can sample."""
    stride, multiple = config.model.autoencoder.stride, config.model.backbone.size_multiple
    return Grid(stride.t, stride.h * multiple.h, stride.w * multiple.w)


def list_presets(config: PipelineConfig) -> tuple[Grid, ...]:
    """Return a model's own size, the same one turned, and a square of about as many pixels."""
    size, steps = config.size, get_size_steps(config)
    side = math.sqrt(size.h * size.w)
    square = size._replace(h=max(1, round(side / steps.h)) * steps.h, w=max(1, round(side / steps.w)) * steps.w)
    return tuple(dict.fromkeys((size, size._replace(h=size.w, w=size.h), square)))


def make_sampling_form(
    config: PipelineConfig, *, adapters: Mapping[str, float], checkpoints: Sequence[int] = ()
) -> tuple[FormField, ...]:
    """Return the fields that all tabs share.

    Args:
      config: Config of the model.
      adapters: Scales of the attached adapters (LoRA), by name.
      checkpoints: Steps of the checkpoints of a run, from which another than the newest may be chosen.
    """
    own = config.sampling
    scales = [own.guidance.get_scale(TEXT, expert) for expert in range(own.guidance.expert_count)]
    solvers = (("", "the model's own"), *((name, name) for name in SOLVERS))
    form: list[FormField] = [
        TextField(name="negative", title="Negative prompt", default=config.negative or None, lines=2),
        NumberField(name="seed", title="Seed", default=0, minimum=0, maximum=MAX_SEED, step=1, is_whole=True),
        NumberField(name="count", title="Clips", default=1, minimum=1, maximum=MAX_COUNT, step=1, is_whole=True),
        NumberField(name="steps", title="Steps", default=own.steps, minimum=1, maximum=1000, step=1, is_whole=True),
        NumberField(
            name="guidance",
            title="Guidance",
            help="1 is none; more follows the prompt more closely and varies less.",
            default=scales[0] if len(set(scales)) == 1 else None,
            minimum=0,
            maximum=100,
            step=0.1,
        ),
        ChoiceField(name="solver", title="Solver", default="", choices=solvers),
        NumberField(name="shift", title="Shift", help="Shift of the times towards noise.", minimum=0.01, step=0.5),
    ]
    for name, scale in adapters.items():
        title, help = f"LoRA {name}", "Strength of the adapter; 0 turns it off."
        limits: dict[str, Any] = {"minimum": -4, "maximum": 4, "step": 0.05}
        form.append(NumberField(name=f"lora:{name}", title=title, help=help, default=scale, **limits))
    if checkpoints:
        choices = (("", "newest"), *((str(step), f"step {step:,}") for step in sorted(checkpoints, reverse=True)))
        form.append(ChoiceField(name="checkpoint", title="Checkpoint", default="", choices=choices))
    return tuple(form)
