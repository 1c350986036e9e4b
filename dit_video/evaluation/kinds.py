"""How a model is evaluated: what is sampled, and what judges it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluation:
    """Every prompt of the rendered shapes is sampled, and judged from the files."""


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluation:
    """Captions of held-out clips are sampled, each at its clip's size. Nothing judges them but a person's eyes."""

    count: int = 8


Evaluation = ShapesEvaluation | CaptionEvaluation
