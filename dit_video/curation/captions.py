"""Captions by a vision-language model on a server with OpenAI's interface; needs the extra `captions`."""

import re
import string
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from dit_video.core.chat import ChatServer, RequestError
from dit_video.core.errors import UserError, check_at_least
from dit_video.curation.annotator import AnnotationError, Annotator, ClipFile, Column, ServiceCost
from dit_video.data.clips import ClipInfo

PROMPT = (
    "These are {frames} frames of a video of {seconds} seconds, in order. Describe in one paragraph what is seen and "
    "what happens: subjects, actions, surroundings, light, style and the camera's motion. Begin with the description."
)
_FIELDS = ("frames", "seconds", "caption")
_PIXELS_PER_TOKEN, _CHARACTERS_PER_TOKEN = 750, 4
"""Rough sizes of tokens of current models, for estimates."""
MAX_FAILURES = 20
"""Number of clips in a row without a caption after which something is wrong with all."""


@dataclass(frozen=True, kw_only=True)
class Captions(Annotator):
    """Captions of a column of their own, which training may draw by weight.

    Raises:
      UserError: If a name or a prompt is not valid, or numbers are out of range.
    """

    threads: ClassVar[int] = 16
    block_clips: ClassVar[int] = 64

    server: ChatServer = field(default_factory=ChatServer)
    """Server that is asked."""
    label: str = "long"
    """Name of the captions: their column is `captions_LABEL`."""
    prompt: str = PROMPT
    """Prompt, in which {frames}, {seconds} and {caption} (the clip's first caption) are replaced. The first two are
    numbers, of which {seconds:.1f} shows one digit after the point."""
    frames: int = 8
    """Maximum number of frames of a clip, at even spacing."""
    max_side: int = 512
    """Maximum height and width in pixels of frames."""
    max_tokens: int = 400
    """Maximum length of a caption in tokens; a longer one is not used."""
    input_price: float | None = None
    """Price of a million tokens of prompts and frames; None if unknown."""
    output_price: float | None = None
    """Price of a million tokens of captions; None if unknown."""
    _failures: "_FailureCount" = field(default_factory=lambda: _FailureCount(), init=False, compare=False, repr=False)

    def __post_init__(self):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.label):
            raise UserError(
                f"label={self.label!r} is invalid: it names a column. Use letters, digits and _, such as long"
            )
        check_at_least(1, frames=self.frames, max_side=self.max_side, max_tokens=self.max_tokens)
        try:
            if unknown := _find_fields(self.prompt) - set(_FIELDS):
                raise UserError(f"prompt has {{{min(unknown)}}}, which is invalid. Use {{{'}, {'.join(_FIELDS)}}}")
            _format_prompt(self.prompt, 1, 1.0, "a caption")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise UserError(
                f"prompt={self.prompt!r} is invalid: {error}. Write braces of text twice, {{{{, and formats as "
                "{seconds:.1f}"
            ) from error

    @property
    def name(self) -> str:
        return f"captions_{self.label}"

    @property
    def columns(self) -> Mapping[str, Column]:
        description = f"Captions by {self.server.model}."
        return {self.name: Column(type=pa.list_(pa.string()), description=description)}

    @property
    def identity(self) -> str:
        return f"captions 1, {self.server.model}, {self.frames} frames of {self.max_side}, {self.prompt!r}"

    @property
    def reads_captions(self) -> bool:
        return "caption" in _find_fields(self.prompt)

    def check(self) -> None:
        self.server.check()

    def estimate_cost(self, infos: Sequence[ClipInfo]) -> ServiceCost:
        """Return the cost of captions for these clips, if they are as long as they may be."""
        pixels = 0.0
        for info in infos:
            shrink = min(1.0, self.max_side / max(info.height, info.width))
            pixels += min(self.frames, info.frames) * info.height * info.width * shrink**2
        prompts = round(pixels / _PIXELS_PER_TOKEN + len(infos) * len(self.prompt) / _CHARACTERS_PER_TOKEN)
        text = (
            f"up to {prompts / 1e6:.3g} M tokens of prompts and {len(infos) * self.max_tokens / 1e6:.3g} M of captions"
        )
        return self._price(prompts, len(infos) * self.max_tokens, text)

    def summarize(self) -> str:
        usage = self.server.usage
        text = f"{usage.prompt_tokens} tokens of prompts and {usage.completion_tokens} of captions"
        return self._price(usage.prompt_tokens, usage.completion_tokens, text).text

    def annotate(self, clip: ClipFile) -> Mapping[str, Any]:
        frames = clip.decode_frames(self.frames, max_side=self.max_side).frames
        info = clip.info
        prompt = _format_prompt(self.prompt, len(frames), info.frames / info.fps, info.caption)
        try:
            text = self.server.ask(prompt, frames, max_tokens=self.max_tokens)
            if not text:
                raise RequestError("the answer is empty")
        except RequestError as error:
            if self._failures.add() >= MAX_FAILURES:
                raise UserError(
                    f"{MAX_FAILURES} clips in a row got no caption, at last: {error}. Check the server"
                ) from error
            raise AnnotationError(str(error)) from error
        self._failures.reset()
        return {self.name: [text]}

    def _price(self, prompt_tokens: int, completion_tokens: int, text: str) -> ServiceCost:
        if self.input_price is None or self.output_price is None:
            # A server on this machine costs nothing more than its time.
            return ServiceCost(text, 0.0 if self.server.is_local else None)
        price = (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6
        return ServiceCost(f"{text}: {price:.2f}", price)


class _Seconds(float):
    """A number of seconds that is written with three digits unless a format is chosen."""

    def __format__(self, spec: str) -> str:
        return super().__format__(spec or ".3g")


def _find_fields(prompt: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}


def _format_prompt(prompt: str, frames: int, seconds: float, caption: str) -> str:
    return prompt.format(frames=frames, seconds=_Seconds(seconds), caption=caption)


class _FailureCount:
    """Counter of failures in a row."""

    def __init__(self) -> None:
        self._count, self._lock = 0, threading.Lock()

    def add(self) -> int:
        with self._lock:
            self._count += 1
            return self._count

    def reset(self) -> None:
        with self._lock:
            self._count = 0
