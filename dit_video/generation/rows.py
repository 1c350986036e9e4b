"""Requests packed into rows: which share one, and where the branches of guidance lie.

Every request has one or several branches: the same noise under other conditions. They are evaluated together if that is
asked for, in one of two ways, whichever takes fewer rows: side by side in one row, as if they were requests of their
own, or in as many rows one below the other.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32, UInt32

from dit_video.core.errors import UserError
from dit_video.core.rng import key
from dit_video.core.typing import AnyArray
from dit_video.generation.given import GivenClip, GivenRows, given_rows
from dit_video.text import TextTokens
from dit_video.tokens import Grid, Item, Rows, RowShape, coordinates, empty_row, pack, patchify, token_grid


class LatentRequest(NamedTuple):
    """One video to be made."""

    prompt: str
    negative: str
    """what the unconditional branch of guidance is given; empty for nothing"""
    noise: Float32[np.ndarray, "t h w c"]
    """the starting point; its size is the size of the result"""
    given: GivenClip = GivenClip()
    seed: int = 0
    """of the noise that stochastic samplers draw on the way"""

    def branches(self, number: int) -> list[tuple[str, GivenClip]]:
        """The prompt of each branch, and what else it is given.

        Raises:
          UserError: three branches of a clip that is not given latents alone.
        """
        if number < 3:
            return [(self.prompt, self.given), (self.negative, self.given)][:number]
        if self.given.beside is None or self.given.image is not None or self.given.known is not None:
            raise UserError(
                "a scale of the image is for models that are given latents beside the noisy ones and nothing else; "
                "leave out image= of guidance"
            )
        without = self.given._replace(beside=np.zeros_like(self.given.beside))
        return [(self.prompt, self.given), (self.negative, self.given), (self.negative, without)]


class Need(NamedTuple):
    """What one request takes up."""

    tokens: int
    texts: tuple[int, ...]
    """tokens of each branch's text"""


class Group(NamedTuple):
    """Rows of one shape."""

    shape: RowShape
    inside: bool
    """whether the branches of a request lie side by side in its row"""
    rows: list[list[int]]
    """the requests of each, by number"""


def plan(needs: Sequence[Need], shape: RowShape, *, rows: int, together: bool) -> list[Group]:
    """Rows of request numbers: first fit of the largest first. A request larger than a row has one of its own.

    Args:
      needs: of every request.
      shape: of a row.
      rows: that are sampled at once.
      together: whether all branches of a request are evaluated at once.

    Raises:
      UserError: a text longer than a row's.
    """
    for need in needs:
        if max(need.texts) > shape.text:
            raise UserError(
                f"a prompt of {max(need.texts)} text tokens is longer than a row's {shape.text}; shorten the prompt"
            )
    order = sorted(range(len(needs)), key=lambda index: -needs[index].tokens)
    apart = [need._replace(texts=(max(need.texts),)) for need in needs]
    large = [index for index in order if needs[index].tokens > shape.tokens]
    small = [index for index in order if needs[index].tokens <= shape.tokens]
    branches = max((len(need.texts) for need in needs), default=1)
    groups = [Group(shape, False, _first_fit(small, apart, shape))]
    if together and branches > 1:
        bundles = [Need(need.tokens * branches, (sum(need.texts),)) for need in needs]
        fit = [index for index in small if _fits(bundles[index], shape, branches)]
        rest = [index for index in small if index not in set(fit)]
        mixed = [
            Group(shape, True, _first_fit(fit, bundles, shape, copies=branches)),
            Group(shape, False, _first_fit(rest, apart, shape)),
        ]
        groups = min(mixed, groups, key=lambda plan: _evaluated(plan, rows, branches))
    for index in large:
        alone = RowShape(tokens=needs[index].tokens, text=shape.text, segments=shape.segments)
        if groups[-1].shape == alone:
            groups[-1].rows.append([index])
        else:
            groups.append(Group(alone, False, [[index]]))
    return [group for group in groups if group.rows]


def _fits(need: Need, shape: RowShape, copies: int) -> bool:
    return need.tokens <= shape.tokens and max(need.texts) <= shape.text and copies <= shape.segments


def _evaluated(groups: Sequence[Group], rows: int, branches: int) -> int:
    """How many rows the model sees in a step; those of padding, which fill up the last batch, count."""
    return sum(-(-len(group.rows) // rows) * rows * (1 if group.inside else branches) for group in groups)


def _first_fit(order: Sequence[int], needs: Sequence[Need], shape: RowShape, *, copies: int = 1) -> list[list[int]]:
    found: list[list[int]] = []
    used: list[list[int]] = []
    for index in order:
        tokens, text = needs[index].tokens, needs[index].texts[0]
        for row, room in zip(found, used, strict=True):
            fits = room[0] + tokens <= shape.tokens and room[1] + text <= shape.text
            if fits and (len(row) + 1) * copies <= shape.segments:
                break
        else:
            row, room = [], [0, 0]
            found.append(row)
            used.append(room)
        row.append(index)
        room[0] += tokens
        room[1] += text
    return found


class Batch(NamedTuple):
    """What the program is given of its requests."""

    branches: tuple[tuple[Rows, GivenRows], ...]
    """rows, and what they are given: one of each branch, or a single one that holds all"""
    places: Int32[AnyArray, "branches B N"] | None
    """where in its row each token has its counterpart of every branch, if rows hold all of them"""
    keys: UInt32[AnyArray, "B G words"]
    """of each segment, for noise on the way"""


class Packer(NamedTuple):
    """Makes batches of requests."""

    requests: Sequence[LatentRequest]
    texts: Mapping[str, TextTokens]
    """of every prompt"""
    patch: Grid
    interval: float
    """of two tokens along time, in what coordinates count"""
    branches: int
    rows: int
    """of a batch; rows of padding fill it up, so that its shape is always the same"""

    def batch(self, group: Group, members: Sequence[Sequence[int]]) -> Batch:
        """Of the requests of some rows of a group."""
        kinds = [range(self.branches)] if group.inside else [[branch] for branch in range(self.branches)]
        packed = tuple(self._packed(group, members, branches) for branches in kinds)
        places = self._places(group, members) if group.inside else None
        return Batch(packed, places, self._keys(group, members))

    def _packed(
        self, group: Group, members: Sequence[Sequence[int]], branches: Sequence[int]
    ) -> tuple[Rows, GivenRows]:
        """Rows of the requests, each with those branches in turn."""
        items: list[list[Item]] = []
        clips: list[list[tuple[GivenClip, Grid, int]]] = []
        for row in members:
            items.append([])
            clips.append([])
            for index in row:
                request, conditions = self.requests[index], self.requests[index].branches(self.branches)
                tokens, at = patchify(request.noise, self.patch), self._coordinates(index)
                for branch in branches:
                    prompt, given = conditions[branch]
                    items[-1].append(Item(tokens, at, self.texts[prompt], index))
                    clips[-1].append((given, Grid(*request.noise.shape[:3]), request.noise.shape[3]))
        first = items[0][0]
        widths = {"width": first.tokens.shape[1], "text_width": first.text.shape[1] if first.text.ndim == 2 else 0}
        full = [pack(row, group.shape, **widths) for row in items]
        full += [empty_row(group.shape, **widths)] * (self.rows - len(full))
        given_to_all = given_rows(clips, patch=self.patch, shape=group.shape, rows=self.rows)
        return Rows(*map(np.stack, zip(*full, strict=True))), given_to_all

    def _coordinates(self, index: int) -> Float32[np.ndarray, "n 3"]:
        return coordinates(self._grid(index), step=(self.interval, 1.0, 1.0))

    def _grid(self, index: int) -> Grid:
        return token_grid(Grid(*self.requests[index].noise.shape[:3]), self.patch)

    def _places(self, group: Group, members: Sequence[Sequence[int]]) -> Int32[np.ndarray, "branches B N"]:
        own = np.arange(group.shape.tokens, dtype=np.int32)
        places = np.tile(own, (self.branches, self.rows, 1))
        for number, row in enumerate(members):
            start = 0
            for index in row:
                length = self._grid(index).volume
                stop = start + self.branches * length
                for branch in range(self.branches):
                    there = start + branch * length + np.arange(length)
                    places[branch, number, start:stop] = np.tile(there, self.branches)
                start = stop
        return places

    def _keys(self, group: Group, members: Sequence[Sequence[int]]) -> UInt32[np.ndarray, "B G words"]:
        """The branches of a request share its noise."""
        copies = self.branches if group.inside else 1
        words = {index: _words(self.requests[index].seed) for row in members for index in row}
        keys = np.zeros((self.rows, group.shape.segments, len(next(iter(words.values())))), np.uint32)
        for number, row in enumerate(members):
            for place, index in enumerate(row):
                keys[number, place * copies : (place + 1) * copies] = words[index]
        return keys


def _words(seed: int) -> UInt32[np.ndarray, " words"]:
    return np.asarray(jax.random.key_data(key(seed, "sampler")))
