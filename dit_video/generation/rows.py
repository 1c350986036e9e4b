"""Packing of requests and their guidance branches into rows.

Every request has one or several branches: the same noise under different conditions. If branches are evaluated
together, there are two ways, and the one with fewer rows is taken: branches side by side in one row, as if they were
separate requests, or in separate rows of a larger batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt32

from dit_video.conditioning import COND_LATENTS, ClipConditioning
from dit_video.core.errors import UserError
from dit_video.core.rng import key
from dit_video.core.typing import AnyArray
from dit_video.generation.conditioning import CLEAN_LATENTS, describe_row_fields, make_row_fields
from dit_video.text import CaptionTokens
from dit_video.tokens import (
    Grid,
    LayoutShape,
    PackedBatch,
    PackedExample,
    compute_positions,
    compute_token_grid,
    make_empty_row,
    pack,
    patchify,
    stack_rows,
)


class SamplingRequest(NamedTuple):
    """A request of one video."""

    prompt: str
    """Text prompt."""
    negative: str
    """Prompt of the unconditional branch of guidance; empty for none."""
    noise: Float32[np.ndarray, "t h w c"]
    """Initial noise, of the size of the result."""
    fields: Mapping[str, np.ndarray] = {}
    """Conditioning besides the prompt, by name: `cond_latents` `t h w g`, `image_tokens` `i F` (all requests of a model
    have the same of these), `clean_latents` `f h w c`."""
    seed: int = 0
    """Seed of the noise that stochastic samplers add."""

    def branches(self, number: int) -> list[tuple[str, Mapping[str, np.ndarray]]]:
        """Return the prompt and the other conditioning of each branch.

        Raises:
          UserError: If there are three branches, and the clip has no conditioning latents or has other conditioning.
        """
        if number < 3:
            return [(self.prompt, self.fields), (self.negative, self.fields)][:number]
        if self.fields.keys() != {COND_LATENTS}:
            raise UserError(
                "image_scale of guidance is invalid: it needs a model whose only conditioning besides the prompt is "
                "conditioning latents. Use image_scale=None."
            )
        without = {COND_LATENTS: np.zeros_like(self.fields[COND_LATENTS])}
        return [(self.prompt, self.fields), (self.negative, self.fields), (self.negative, without)]


class RequestSize(NamedTuple):
    """The size of one request."""

    grid: Grid
    """Number of tokens along (t, h, w)."""
    texts: tuple[int, ...]
    """Number of text tokens of each branch."""


class PackedRequests(NamedTuple):
    """Requests in rows or canvases of one shape."""

    shape: LayoutShape
    """Shape of a row."""
    is_side_by_side: bool
    """True if the branches of a request lie side by side in its row, instead of in rows of their own."""
    rows: list[list[int]]
    """Requests of each row, by number."""


def plan_rows(sizes: Sequence[RequestSize], shape: LayoutShape, *, rows: int, is_batched: bool) -> list[PackedRequests]:
    """Return the requests, by number, in rows or canvases by first fit, the largest first.

    A request that is larger than a row gets one of its own.

    Args:
      sizes: Sizes of all requests.
      shape: Shape of a row.
      rows: Number of rows that are sampled at once.
      is_batched: Evaluates all branches of a request at once.

    Raises:
      UserError: If a text is longer than a row's.
    """
    for size in sizes:
        if max(size.texts) > shape.text:
            length = max(size.texts)
            raise UserError(f"a prompt of {length} text tokens is longer than a row's {shape.text}; shorten the prompt")
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index].grid.volume)
    separate = [_Bundle([size.grid], [max(size.texts)]) for size in sizes]
    small = [index for index in order if separate[index].fits(shape)]
    branches = max((len(size.texts) for size in sizes), default=1)
    groups = [PackedRequests(shape, False, _pack_first_fit(small, separate, shape))]
    # Requests whose branches fit a row together can have them side by side; the others stay in separate rows. The plan
    # that evaluates fewer rows, padding rows included, is taken.
    if is_batched and branches > 1:
        bundles = [_Bundle([size.grid] * branches, list(size.texts)) for size in sizes]
        fitting = [index for index in small if bundles[index].fits(shape)]
        remaining = [index for index in small if index not in set(fitting)]
        combined = [
            PackedRequests(shape, True, _pack_first_fit(fitting, bundles, shape)),
            PackedRequests(shape, False, _pack_first_fit(remaining, separate, shape)),
        ]
        groups = min(combined, groups, key=lambda plan: _count_evaluated_rows(plan, rows, branches))
    for index in (index for index in order if index not in set(small)):
        row_shape = shape.enlarge(sizes[index].grid)
        if groups[-1].shape == row_shape:
            groups[-1].rows.append([index])
        else:
            groups.append(PackedRequests(row_shape, False, [[index]]))
    return [group for group in groups if group.rows]


class _Bundle(NamedTuple):
    """The branches of a request, or one of them, which lie together in a row."""

    grids: list[Grid]
    texts: list[int]

    def fits(self, shape: LayoutShape) -> bool:
        return shape.fits(self.grids, self.texts)

    def add(self, other: "_Bundle") -> "_Bundle":
        return _Bundle(self.grids + other.grids, self.texts + other.texts)


def _count_evaluated_rows(groups: Sequence[PackedRequests], rows: int, branch_count: int) -> int:
    """Return the number of rows that the model evaluates per step, including padding rows of the last batch."""
    return sum(-(-len(group.rows) // rows) * rows * (1 if group.is_side_by_side else branch_count) for group in groups)


def _pack_first_fit(order: Sequence[int], bundles: Sequence[_Bundle], shape: LayoutShape) -> list[list[int]]:
    rows: list[list[int]] = []
    contents: list[_Bundle] = []
    for index in order:
        for number, content in enumerate(contents):
            if (extended := content.add(bundles[index])).fits(shape):
                rows[number].append(index)
                contents[number] = extended
                break
        else:
            rows.append([index])
            contents.append(bundles[index])
    return rows


Members = Sequence[Sequence[int]]
"""Requests of each row, by number."""


class SamplingBatch(NamedTuple):
    """The inputs of the compiled program."""

    branches: tuple[PackedBatch, ...]
    """Rows: those of each branch, or a single one with all branches."""
    branch_positions: Int32[AnyArray, "branches B N"] | None
    """Position of each token's counterpart in every branch, if rows hold all of them."""
    keys: UInt32[AnyArray, "B G words"]
    """Key of each segment, for the noise of stochastic samplers."""


class Packer(NamedTuple):
    """A packer of requests into batches."""

    requests: Sequence[SamplingRequest]
    """All requests."""
    texts: Mapping[str, CaptionTokens]
    """Tokens of every prompt."""
    patch: Grid
    """Patch size of the denoiser."""
    token_dt: float
    """Distance of consecutive tokens along time, in units of positions."""
    branch_count: int
    """Number of guidance branches."""
    rows: int
    """Number of rows of a batch; padding rows fill it up, so that its shape is constant."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning by fields of the clips, which every request has."""

    def make_batch(self, group: PackedRequests, row_requests: Members) -> SamplingBatch:
        """Return the batch of the requests in some rows of a group."""
        kinds = (
            [range(self.branch_count)] if group.is_side_by_side else [[branch] for branch in range(self.branch_count)]
        )
        packed = tuple(self._pack_branches(group, row_requests, branches) for branches in kinds)
        positions = None
        if group.is_side_by_side:
            positions = self._compute_branch_positions(group, row_requests, np.asarray(packed[0].segments))
        return SamplingBatch(packed, positions, self._make_keys(group, row_requests))

    def _pack_branches(self, group: PackedRequests, row_requests: Members, branches: Sequence[int]) -> PackedBatch:
        """Return rows of the requests, with these branches of each."""
        items: list[list[PackedExample]] = [[] for _ in row_requests]
        has_clean = any(CLEAN_LATENTS in request.fields for request in self.requests)
        for number, row in enumerate(row_requests):
            for index in row:
                request, conditions = self.requests[index], self.requests[index].branches(self.branch_count)
                tokens = patchify(request.noise, self.patch)
                positions = compute_positions(self._get_token_grid(index), step=(self.token_dt, 1.0, 1.0))
                for branch in branches:
                    prompt, fields = conditions[branch]
                    row_fields = make_row_fields(fields, request.noise.shape, self.patch, has_clean=has_clean)
                    for each in self.conditioning:
                        row_fields[each.field.name] = each.field.patchify(fields[each.field.name], self.patch)
                    items[number].append(PackedExample(tokens, positions, self.texts[prompt], index, row_fields))
        first = items[0][0]
        contents: dict[str, Any] = {
            "width": first.tokens.shape[1],
            "text_width": first.text.shape[1] if first.text.ndim == 2 else 0,
            "fields": [
                *describe_row_fields(first.fields),
                *(each.field.to_rows(self.patch) for each in self.conditioning),
            ],
        }
        packed = [pack(row, group.shape, **contents) for row in items]
        packed += [make_empty_row(group.shape, **contents)] * (self.rows - len(packed))
        return stack_rows(packed)

    def _get_token_grid(self, index: int) -> Grid:
        return compute_token_grid(Grid(*self.requests[index].noise.shape[:3]), self.patch)

    def _compute_branch_positions(
        self, group: PackedRequests, row_requests: Members, segments: Int32[np.ndarray, "B N"]
    ) -> Int32[np.ndarray, "branches B N"]:
        """Return the token of the same place in every branch; a token of padding is its own counterpart.

        The branches of a request are consecutive segments.
        """
        identity = np.arange(group.shape.tokens, dtype=np.int32)
        positions = np.tile(identity, (self.branch_count, self.rows, 1))
        for number, row in enumerate(row_requests):
            for slot in range(len(row)):
                first = slot * self.branch_count + 1
                members = [np.flatnonzero(segments[number] == first + branch) for branch in range(self.branch_count)]
                for branch, counterparts in enumerate(members):
                    for tokens in members:
                        positions[branch, number, tokens] = counterparts
        return positions

    def _make_keys(self, group: PackedRequests, row_requests: Members) -> UInt32[np.ndarray, "B G words"]:
        """Return keys of segments; the branches of a request share its noise."""
        copies = self.branch_count if group.is_side_by_side else 1
        seeds = {index: self.requests[index].seed for row in row_requests for index in row}
        seed_keys = {index: np.asarray(jax.random.key_data(key(seed, "sampler"))) for index, seed in seeds.items()}
        keys = np.zeros((self.rows, group.shape.segments, len(next(iter(seed_keys.values())))), np.uint32)
        for number, row in enumerate(row_requests):
            for slot, index in enumerate(row):
                keys[number, slot * copies : (slot + 1) * copies] = seed_keys[index]
        return keys
