"""Examples before they are read: all that a plan of rows needs to know, and what it draws for each of their uses."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from dit_video.core import rng
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharedStrings, SharesArrays
from dit_video.data.captions import CaptionSource
from dit_video.data.damage import read_undamaged
from dit_video.data.packing.mixture import Mixture
from dit_video.models.encoders import CaptionTokens
from dit_video.tokens import Grid, LayoutShape, PackedExample, compute_positions


class Entry(NamedTuple):
    """One use of an example: its place in the plan, and what is drawn for it."""

    example: int
    """Number of the example in its source."""
    rank: int
    """Running number of the use in the plan, modulo 2**32."""
    seed: int
    """Seed of the run."""
    draw: tuple[int, ...]
    """Numbers that all choices are functions of, besides the seed: epoch and example, or the rank in buckets."""
    caption_index: int
    """Number of the drawn caption among those of the example."""
    grid: Grid
    """Size in tokens."""
    crop: Grid | None = None
    """Size in pixels to which the clip of a bucket is resized and cropped; None for its training size."""

    def make_generator(self, purpose: str) -> np.random.Generator:
        """Return the random numbers of a choice."""
        return rng.make_generator(self.seed, purpose, *self.draw)


class PlannedRow(NamedTuple):
    """The examples of a row, and the shape of the row."""

    shape: LayoutShape
    entries: list[Entry]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleTable(SharesArrays):
    """The names, sizes, captions and costs of all examples of a source."""

    names: SharedStrings
    """Names of the examples, for errors and the hash."""
    grids: Int[np.ndarray, "n 3"]
    """Size of every example, in tokens."""
    captions: CaptionSource
    """Captions of every example; the drawn ones are read with the example, or as it is encoded."""
    attention_pairs: Float[np.ndarray, " n"] | None = None
    """Token pairs in the attention of every example, the cost of rows; None for full attention."""
    mixture: Mixture | None = None
    """Choice of an epoch's examples; None for each example once."""
    token_dt: Float[np.ndarray, " n"] | None = None
    """Spacing of consecutive tokens along time for each example, in the unit of the positions; None counts tokens."""
    token_lead: float = 0.0
    """Fraction of `token_dt` by which all tokens but a clip's first begin earlier; see `compute_positions`."""

    def __len__(self) -> int:
        return len(self.grids)

    def get_grid(self, example: int) -> Grid:
        """Return the size of an example, in tokens."""
        return Grid(*self.grids[example].tolist())

    def draw_caption(self, example: int, seed: int, draw: tuple[int, ...]) -> int:
        """Return the number of a caption of an example, a function of the seed and of `Entry.draw`."""
        return self.captions.lengths.draw(example, lambda: rng.make_generator(seed, "caption", *draw))

    def read_caption(self, entry: Entry) -> CaptionTokens | None:
        """Return the caption of an entry; if its record is damaged, log a warning with its name and return None."""
        name = self.names[entry.example]
        return read_undamaged(name, lambda: self.captions.read(entry.example, entry.caption_index))

    def make_example(
        self, entry: Entry, tokens: Float32[np.ndarray, "n p"] | None, fields: Mapping[str, np.ndarray], width: int
    ) -> PackedExample:
        """Return an entry as a row holds it, with its caption.

        Args:
          entry: The entry.
          tokens: Its tokens; None if the example is damaged, which keeps its segment and does not count in the loss.
          fields: Its further fields, as a row takes them.
          width: Number of values of a token.
        """
        text = self.read_caption(entry)
        interval = 1.0 if self.token_dt is None else float(self.token_dt[entry.example])
        return PackedExample(
            tokens=np.zeros((entry.grid.volume, width), np.float32) if tokens is None else tokens,
            positions=_get_positions(entry.grid, interval, self.token_lead),
            text=self.captions.empty if text is None else text,
            example=entry.rank,
            fields=fields,
            valid=tokens is not None and text is not None,
        )

    def extend_hash(self, plan_hash: str) -> str:
        """Return the hash of a plan and of the names, sizes, captions and positions of the examples that it places."""
        content = hashlib.sha256(plan_hash.encode())
        for values in self._iter_hash_bytes():
            content.update(values)
        return content.hexdigest()[:16]

    def _iter_hash_bytes(self) -> Iterator[bytes]:
        yield self.names.content.tobytes()
        yield self.names.offsets.astype("<i8").tobytes()
        yield self.grids.astype("<i4").tobytes()
        yield from self.captions.iter_hash_bytes()
        if self.token_dt is not None:
            yield self.token_dt.astype("<f8").tobytes() + repr(self.token_lead).encode()


def compute_attention_pairs(
    grids: Int[np.ndarray, "n 3"], count: Callable[[Grid], float] | None
) -> Float[np.ndarray, " n"] | None:
    """Return the token pairs in the attention of every example by a function of its size; None for full attention."""
    if count is None:
        return None
    distinct, _, kinds = find_distinct_grids(grids)
    return np.asarray([float(count(grid)) for grid in distinct])[kinds]


@functools.lru_cache(maxsize=1024)
def _get_positions(grid: Grid, interval: float, lead: float) -> Float32[np.ndarray, "n 3"]:
    return compute_positions(grid, step=(interval, 1.0, 1.0), lead=lead)
