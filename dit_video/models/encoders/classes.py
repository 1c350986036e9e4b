"""Class labels instead of texts: a caption is the name or the number of a class."""

from dataclasses import dataclass

import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Int32

from dit_video.core.errors import UserError, check_at_least
from dit_video.models.encoders.interface import Context, Tokenizer


@dataclass(frozen=True, kw_only=True)
class ClassNamesConfig:
    """Configuration of the classes, for a denoiser with `ClassLabels` of the same number.

    Raises:
      UserError: no class, or more names than classes.
    """

    classes: int
    """Number of classes."""
    names: tuple[str, ...] = ()
    """Names of the classes in order; synonyms of one class are separated by commas."""

    def __post_init__(self):
        check_at_least(max(1, len(self.names)), classes=self.classes)

    @property
    def width(self) -> int:
        """Return the width of the context: 0, as there is none."""
        return 0

    @property
    def max_tokens(self) -> int:
        """Return the tokens of a caption: 1, its class."""
        return 1

    def make(self, rngs: nnx.Rngs) -> "ClassNames":
        return ClassNames()

    def make_tokenizer(self) -> Tokenizer:
        return ClassTokenizer(self)


class ClassTokenizer:
    """A tokenizer whose only token is a caption's class; the empty caption is the number of classes, for no class."""

    def __init__(self, config: ClassNamesConfig):
        self._classes = config.classes
        self._classes_by_name: dict[str, list[int]] = {}
        for number, names in enumerate(config.names):
            for name in {synonym.strip() for synonym in (names, *names.split(","))}:
                self._classes_by_name.setdefault(name, []).append(number)

    def __call__(self, text: str) -> Int32[np.ndarray, " 1"]:
        """Return the class of a caption.

        Raises:
          UserError: no class has this name or number, or several have it.
        """
        return np.asarray([self._find_class(text.strip())], np.int32)

    def _find_class(self, text: str) -> int:
        if not text:
            return self._classes
        names = self._classes_by_name
        matches = [int(text)] if text.isdecimal() and int(text) < self._classes else names.get(text, [])
        if len(matches) == 1:
            return matches[0]
        if matches:
            numbers = ", ".join(map(str, matches))
            raise UserError(f"the caption {text!r} is ambiguous: it names classes {numbers}. Use the number")
        named = f", or one of {len(names)} names such as {next(iter(names))!r}" if names else ""
        raise UserError(f"the caption {text!r} is no class: use a number from 0 to {self._classes - 1}{named}")


class ClassNames(nnx.Module):
    """A text encoder without parameters that passes class labels on, and no context."""

    def __call__(self, labels: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Context:
        return Context(None, None, labels, segments)
