"""Classes in the place of texts: a caption is the name of a class, or its number."""

from dataclasses import dataclass

import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Int32

from dit_video.core.errors import UserError
from dit_video.text.interface import Context, Tokenizer


@dataclass(frozen=True, kw_only=True)
class ClassNamesConfig:
    """What classes there are, for a denoiser with `ClassLabels` of as many.

    Raises:
      UserError: no class, or more names than classes.
    """

    classes: int
    names: tuple[str, ...] = ()
    """of the classes in order; several of one, each of which stands for it, have commas between them"""

    def __post_init__(self):
        if self.classes < 1 or len(self.names) > self.classes:
            raise UserError(f"there is 1 class or more, and one name for each; got {self.classes}, {len(self.names)}")

    @property
    def width(self) -> int:
        """Of what a denoiser attends to: there is nothing."""
        return 0

    @property
    def max_tokens(self) -> int:
        """The class."""
        return 1

    def make(self, rngs: nnx.Rngs) -> "ClassNames":
        return ClassNames()

    def tokenizer(self) -> Tokenizer:
        return ClassTokenizer(self)


class ClassTokenizer:
    """The number of a class, as the one token of a caption; the empty caption is the number of classes, for none."""

    def __init__(self, config: ClassNamesConfig):
        self._classes = config.classes
        self._numbers: dict[str, list[int]] = {}
        for number, names in enumerate(config.names):
            for name in {each.strip() for each in (names, *names.split(","))}:
                self._numbers.setdefault(name, []).append(number)

    def __call__(self, text: str) -> Int32[np.ndarray, " 1"]:
        """The class of a caption.

        Raises:
          UserError: no class has this name or number, or several have it.
        """
        return np.asarray([self._number(text.strip())], np.int32)

    def _number(self, text: str) -> int:
        if not text:
            return self._classes
        found = [int(text)] if text.isdecimal() and int(text) < self._classes else self._numbers.get(text, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"the classes {', '.join(map(str, found))} are all called {text!r}; name the number")
        known = f", or one of {len(self._numbers)} names such as {next(iter(self._numbers))!r}" if self._numbers else ""
        raise UserError(f"no class is called {text!r}; classes are numbers from 0 to {self._classes - 1}{known}")


class ClassNames(nnx.Module):
    """Classes as they are: no parameters, and no context to attend to."""

    def __call__(self, labels: Int[Array, "B S"], segments: Int[Array, "B S"]) -> Context:
        return Context(None, None, labels, segments)
