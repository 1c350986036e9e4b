"""Sizes along time, height and width."""

from typing import NamedTuple


class Grid(NamedTuple):
    """A size along (time, height, width): of a clip in pixels, latents, a token grid, a stride or a patch."""

    t: int
    h: int
    w: int

    def __str__(self) -> str:
        return f"{self.t}x{self.h}x{self.w}"

    @property
    def volume(self) -> int:
        return self.t * self.h * self.w
