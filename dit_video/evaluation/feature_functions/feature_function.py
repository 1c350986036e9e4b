"""The interface of functions of clips whose values metrics compare, such as the features of a pretrained network."""

import abc
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.video import Clip


class OpenFeatures(NamedTuple):
    """A function of clips with its weights in memory."""

    extract: Callable[[Sequence[Clip]], Float32[np.ndarray, "n d"]]
    """Returns a row of features for each clip, or for each frame where `is_of_frames`."""
    identity: str
    """Name of the function, and hash of its weights: values of different identities are not comparable."""
    is_of_frames: bool = False
    """True for a row of each frame, clip after clip; False for one row of each clip."""

    def extract_by_clip(self, clips: Sequence[Clip]) -> list[Float32[np.ndarray, "_ d"]]:
        """Return the rows of each clip.

        Raises:
          UserError: the function returned another number of rows than `is_of_frames` says.
        """
        lengths = [len(clip.frames) if self.is_of_frames else 1 for clip in clips]
        rows = self.extract(clips)
        if len(rows) != sum(lengths):
            kind = "frames" if self.is_of_frames else "clips"
            rule = f"it returned {len(rows)} rows for {sum(lengths)} {kind}"
            raise UserError(f"features={self.identity} is invalid: {rule}. Use is_of_frames=True for a row a frame.")
        return np.split(rows, np.cumsum(lengths, axis=0)[:-1])


@dataclass(frozen=True, kw_only=True)
class FeatureFunction(abc.ABC):
    """Base of the configs of functions of clips; a subclass names the weights, which `open` reads once."""

    @abc.abstractmethod
    def load(self) -> OpenFeatures:
        """Read the weights.

        Raises:
          MissingError: a file of weights does not exist.
          UserError: it is of another network.
        """

    def open(self) -> OpenFeatures:
        """Return the function; configs that are equal share one, so that its weights are read once.

        Raises:
          MissingError: a file of weights does not exist.
          UserError: it is of another network.
        """
        return _load(self)


@functools.cache
def _load(config: FeatureFunction) -> OpenFeatures:
    return config.load()


def make_identity(name: str, *files: str | Path) -> str:
    """Return the name of a function with the first 12 digits of the SHA-256 of its files of weights."""
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"{name} {digest.hexdigest()[:12]}"
