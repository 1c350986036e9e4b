"""How a model is evaluated: what is sampled, and what judges it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluation:
    """Every prompt of the rendered shapes is sampled, and judged from the files."""


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluation:
    """Captions of training clips and of held-out ones are sampled. Nothing judges them but a person's eyes."""

    trained: int = 4
    """How many different captions of training clips, each at its clip's size; they show what was learned by heart."""
    held_out: int = 4
    """How many of held-out clips."""


Evaluation = ShapesEvaluation | CaptionEvaluation
