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

from dit_video.video import Clip


class OpenFeatures(NamedTuple):
    """A function of clips with its weights in memory."""

    extract: Callable[[Sequence[Clip]], Float32[np.ndarray, "n d"]]
    """Returns a row of features for each clip, or for each frame in the case of features of images."""
    identity: str
    """Name of the function, and hash of its weights: values of different identities are not comparable."""


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
