"""Protocols on the names of emoji: of those that were trained on, and of pairs of parts that were not.

Whoever imports this module can name them: `emoji`, `emoji_tones` and `emoji_persons`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.data.clips import ClipSource
from dit_video.emoji.metrics import (
    EmojiCopies,
    EmojiMatches,
    EmojiMotion,
    EmojiNames,
    EmojiSeams,
    EmojiSet,
    EmojiTones,
    EmojiTruth,
)
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.protocol import EvaluationData, EvaluationProtocol
from dit_video.evaluation.protocols import register_protocol
from dit_video.tokens import Grid
from dit_video.video import Clip

EMOJI_METRICS = (EmojiNames(), EmojiTones(), EmojiMatches(), EmojiMotion(), EmojiSeams(), EmojiCopies())


@dataclass(frozen=True, kw_only=True)
class EmojiProtocol(EvaluationProtocol):
    """A protocol whose prompts are names of emoji, and whose samples have the length of the real clips.

    The data is a data set of emoji with the columns that `emoji.source.write_columns` adds.
    """

    kind: Literal["seen", "tone", "person"] = "seen"
    """Emoji whose names are prompts: those that were trained on, or of which a pair of parts was held out."""
    side: int = 96
    """Height and width of the samples, in pixels."""
    captions: str = "captions"
    """Column of the prompts, such as that of another language."""

    def make_data(self, data: EvaluationData | None) -> EvaluationData:
        """Return the emoji of the kind, at the size of the samples.

        Raises:
          UserError: If there is no data, it has no columns of emoji, or none is of the kind.
        """
        clips = super().make_data(data).clips
        source = ClipSource(clips.location, captions={self.captions: 1.0}, background=self.background)
        emoji = EmojiSet(source)
        expected = "" if self.kind == "seen" else self.kind
        numbers = [number for number, kind in enumerate(emoji.held_out) if kind == expected]
        if not numbers:
            raise UserError(f"kind={self.kind!r} is invalid: {clips.location} has no such emoji. Use another kind.")
        infos = source.infos
        chosen = [infos[number] for number in numbers]
        stored = [Grid(info.frames, self.side, self.side) for info in chosen]
        return EvaluationData(
            ClipSet(
                clips.location,
                tuple(info.name for info in chosen),
                tuple(info.caption for info in chosen),
                partial(_read, emoji, numbers, self.side),
                get_size=stored.__getitem__,
                truths=tuple(EmojiTruth(emoji, number) for number in numbers),
            )
        )


def _read(emoji: EmojiSet, numbers: list[int], side: int, index: int, fps: float | None) -> Clip:
    clip = emoji.read(numbers[index])
    return Clip(resize(clip.frames, side, side), fps=clip.fps, caption=clip.caption)


_SEEN = EmojiProtocol(name="emoji", metrics=EMOJI_METRICS, count=256, codec="apng", seed=10**6)
register_protocol(_SEEN)
register_protocol(replace(_SEEN, name="emoji_tones", kind="tone"))
register_protocol(replace(_SEEN, name="emoji_persons", kind="person"))
