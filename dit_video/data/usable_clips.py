"""Selection of the clips that a model can be trained on: one bad clip of many is excluded, instead of ending the run.

The selection is a function of the index of the clips and of the requirements alone. So every process of a run, and a
run that is continued, excludes the same clips; no later step sees them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.sizes import SizeLimits, explain_misfit, fit_size, fit_sizes
from dit_video.models.encoders import Tokenizer
from dit_video.tokens import Grid

_NAMED = 3
"""Number of excluded clips that a message names."""


class ExcludedClip(NamedTuple):
    """A clip that cannot be trained on, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClipRequirements:
    """Requirements of a training that each of its clips meets."""

    limits: tuple[SizeLimits, ...] = ()
    """Limits; a clip has a training size within each of them."""
    has_room: Callable[[Grid], bool] | None = None
    """Function that tells if a canvas has room for a clip of a training size; None if it has for every clip within the
    limits."""
    tokenize: Tokenizer | None = None
    """Tokenizer of the captions; None if they are known to be short enough."""
    max_text: int = 0
    """Maximum number of text tokens of a caption."""

    def explain(self, info: ClipInfo) -> str:
        """Return the reason why a clip cannot be trained on; empty if it can."""
        try:
            return self._explain_size(info) or self._explain_captions(info)
        except UserError as error:  # a size that does not divide into cells, or a caption that is no class
            return f"no place in a row: {error}"

    def find_misfits(self, clips: ClipSource) -> Bool[np.ndarray, " n"]:
        """Return which clips do not meet the requirements: a size and a caption are looked at once, however common."""
        is_misfit = np.zeros(len(clips), bool)
        for limits in self.limits:
            distinct, _, kinds = find_distinct_grids(fit_sizes(clips, limits, allow_misfits=True))
            has_room = self.has_room or bool
            is_misfit |= ~np.asarray([size.t > 0 and _holds(has_room, size) for size in distinct], bool)[kinds]
        if (tokenize := self.tokenize) is not None:
            is_short = functools.cache(lambda text: _holds(lambda: len(tokenize(text)) <= self.max_text))
            is_misfit |= np.asarray([not all(map(is_short, info.captions)) for info in clips.infos], bool)
        return is_misfit

    def _explain_size(self, info: ClipInfo) -> str:
        for limits in self.limits:
            if reason := explain_misfit(info, limits):
                return reason
            if self.has_room is not None and not self.has_room(size := fit_size(info, limits)):
                return f"a training size of {size}, for which a canvas has no room"
        return ""

    def _explain_captions(self, info: ClipInfo) -> str:
        if self.tokenize is None:
            return ""
        length = max((len(self.tokenize(caption)) for caption in info.captions), default=0)
        return f"a caption of {length} text tokens, but a row has room for {self.max_text}" * (length > self.max_text)


def _holds(condition: Callable[..., bool], *arguments: Any) -> bool:
    try:
        return condition(*arguments)
    except UserError:
        return False


class UsableClips(NamedTuple):
    """Selection of clips, with those that are excluded."""

    clips: ClipSource
    excluded: tuple[ExcludedClip, ...]

    @property
    def total(self) -> int:
        """Return the number of clips before the selection."""
        return len(self.clips) + len(self.excluded)

    def describe(self) -> str:
        """Return a sentence with the number of excluded clips, and the names and reasons of the first ones."""
        first = "; ".join(f"{name} has {reason}" for name, reason in self.excluded[:_NAMED])
        more = "; …" if len(self.excluded) > _NAMED else ""
        return f"{len(self.excluded)} of {self.total} clips cannot be used: {first}{more}"

    def to_json(self) -> dict[str, Any]:
        """Return the number of clips before the selection, and the reason by the name of every excluded one."""
        return {"clips": self.total, "excluded": dict(self.excluded)}

    def check(self, max_share: float) -> None:
        """Check that no more than this share of the clips is excluded, and not all of them.

        Raises:
          UserError: If too many clips are excluded; the message names the first ones with their reasons.
        """
        if len(self.excluded) > max_share * self.total or (self.excluded and not len(self.clips)):
            raise UserError(
                f"{self.describe()}. At most {max_share:.3g} of them may be excluded (data.max_excluded_share). Remove "
                "these clips or shorten their captions, use a smaller stride or patch, raise data.max_pixels or the "
                "layout's room, or raise data.max_excluded_share."
            )


def select_usable(clips: ClipSource, requirements: ClipRequirements) -> UsableClips:
    """Return the clips that meet the requirements, in the same order, and the others with the reasons."""
    misfits = (clips.infos[number] for number in np.flatnonzero(requirements.find_misfits(clips)).tolist())
    excluded = tuple(ExcludedClip(info.name, requirements.explain(info)) for info in misfits)
    return UsableClips(clips.exclude([name for name, _ in excluded]) if excluded else clips, excluded)
