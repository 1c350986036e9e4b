"""Configurations of an evaluation: prompts to sample, and the judge."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluation:
    """Evaluation on all prompts of the rendered shapes, judged from the generated files."""


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluation:
    """Evaluation on captions of training clips and of held-out clips, for visual inspection only."""

    trained: int = 4
    """Number of different captions of training clips, each at its clip's size; their samples show memorisation."""
    held_out: int = 4
    """Number of different captions of held-out clips."""


Evaluation = ShapesEvaluation | CaptionEvaluation
