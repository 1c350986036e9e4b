"""Architecture of the U-Net."""

import math
from dataclasses import dataclass

from dit_video.core.errors import UserError
from dit_video.models.backbones.protocol import BackboneConfig, ClipTokens, count_tokens
from dit_video.nn import Backend
from dit_video.tokens import Canvas, DenseBatch, Grid, PackedRows

SPATIAL_KERNEL, TEMPORAL_KERNEL = (1, 3, 3), (3, 1, 1)
TIME_FEATURES = 256
"""Number of sines and cosines of the time."""


@dataclass(frozen=True, kw_only=True)
class UnetArchitecture(BackboneConfig):
    """Fields of a `UnetConfig`, with their checks and costs.

    Raises:
      UserError: no levels, a level that attends but does not exist, or widths that groups or heads do not divide.
    """

    channels: int
    """Number of latent channels."""
    context_width: int = 0
    """Width of the text encoder's output (E); 0 without text."""
    patch: Grid = Grid(1, 1, 1)
    width: int = 64
    """Number of channels at the highest resolution."""
    multipliers: tuple[int, ...] = (1, 2)
    """Factors of the width at each level; height and width of the latents are halved from level to level."""
    blocks: int = 1
    """Number of residual blocks of a level, on the way down and again on the way up."""
    attention_levels: tuple[int, ...] = (1,)
    """Levels, from 0, at which tokens attend to those of their clip and to the text; those in the middle always do."""
    heads: int = 4
    groups: int = 8
    """Number of groups of channels in the norms."""
    attention: Backend = "chunked"
    """Backend of attention; `chunked` skips the pairs of different clips of a canvas."""
    dtype: str = "float32"
    """Dtype of convolutions and matrix products; norms and residual features are float32."""

    def __post_init__(self):
        if not self.multipliers or min(self.multipliers) < 1 or self.blocks < 1:
            raise UserError(
                f"multipliers={self.multipliers}, blocks={self.blocks} is invalid: a U-Net has at least one level and "
                "one block. Use 1 or more."
            )
        if any(level not in range(len(self.multipliers)) for level in self.attention_levels):
            raise UserError(
                f"attention_levels={self.attention_levels} is invalid: levels are numbered from 0 to "
                f"{len(self.multipliers) - 1}. Use these."
            )
        for name, divisor in (("groups", self.groups), ("heads", self.heads)):
            if divisor < 1 or self.width % divisor:
                raise UserError(f"{name}={divisor} is invalid: it must divide width={self.width}. Use a divisor.")
        if self.patch != Grid(1, 1, 1):
            raise UserError(f"patch={tuple(self.patch)} is invalid: a U-Net has no patches. Use Grid(1, 1, 1).")

    @property
    def layouts(self) -> tuple[type[PackedRows], ...]:
        return (DenseBatch, Canvas)

    @property
    def size_multiple(self) -> Grid:
        side = 2 ** (len(self.multipliers) - 1)
        return Grid(1, side, side)

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the number of channels at each level."""
        return tuple(self.width * factor for factor in self.multipliers)

    @property
    def condition_width(self) -> int:
        """Return the width of the condition of a clip, which is made of its time."""
        return 4 * self.width

    @property
    def layers(self) -> int:  # type: ignore[override]
        """Return the number of layers of attention."""
        return sum(layers for _, _, layers in self._list_attention(1))

    @property
    def layer_params(self) -> float:
        grid = self.size_multiple.volume
        weights = self.count_multiplications(grid, text=0, image=0) - self._count_condition_multiplications()
        return weights / (grid * self.layers * self.width**2)

    def attention_pairs(self, grid: Grid) -> float:
        return self.count_pairs(grid, text=0) / self.layers

    def count_pairs(self, clip: ClipTokens, *, text: int) -> int:
        attention = self._list_attention(count_tokens(clip))
        return sum(layers * tokens * (tokens + text) for tokens, _, layers in attention)

    def count_multiplications(self, clip: ClipTokens, *, text: int, image: int) -> int:
        if image:
            raise UserError(f"this model has no image tokens; leave out images, of which this clip has {image}")
        tokens, space, time = count_tokens(clip), math.prod(SPATIAL_KERNEL), math.prod(TEMPORAL_KERNEL)
        total = self._count_condition_multiplications() + 2 * tokens * space * self.channels * self.width
        for level, width in enumerate(self.widths):
            positions, square = tokens // 4**level, width**2
            down, up = space + time, 2 * space + time + 2  # the second with a linear map of the two merged inputs
            total += self.blocks * positions * (down + up) * square
            if level == len(self.widths) - 1:
                total += 2 * positions * (space + time) * square
            else:
                coarse = self.widths[level + 1]
                total += positions * width * coarse * (1 + space)  # from and to the lower resolution
        for positions, width, layers in self._list_attention(tokens):
            cross = 2 * positions * width**2 + 2 * text * self.context_width * width if self.context_width else 0
            total += layers * (positions * 12 * width**2 + cross + 2 * width * positions * (positions + text))
        return total

    def _count_condition_multiplications(self) -> int:
        width = self.condition_width
        blocks = sum(2 * self.blocks * 2 * level_width for level_width in self.widths) + 2 * 2 * self.widths[-1]
        return TIME_FEATURES * width + width**2 + width * blocks

    def _list_attention(self, tokens: int) -> list[tuple[int, int, int]]:
        """Return tokens, width and number of layers of each level with attention."""
        last = len(self.multipliers) - 1
        counts = dict.fromkeys(self.attention_levels, 2 * self.blocks)
        counts[last] = counts.get(last, 0) + 1
        return [(tokens // 4**level, self.widths[level], layers) for level, layers in sorted(counts.items())]
