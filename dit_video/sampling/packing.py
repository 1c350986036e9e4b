"""Packing of requests and their guidance branches into rows, and of rows into batches that take the same steps.

Every request has one or several branches: the same noise under different conditions. If branches are evaluated
together, there are two ways, and the one with fewer rows is taken: branches side by side in one row, as if they were
separate requests, or in separate rows of a larger batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt32

from dit_video.core.errors import UserError
from dit_video.core.rng import key
from dit_video.core.typing import AnyArray
from dit_video.diffusion import TEXT, ClipSize, Guidance, Process, SampleTimes
from dit_video.distributed import count_row_shards
from dit_video.distributed.gather import to_host
from dit_video.distributed.mesh import AnyMesh
from dit_video.models.conditioning import COND_LATENTS, IMAGE_TOKENS
from dit_video.models.encoders import CaptionTokens
from dit_video.sampling.denoiser import Denoiser
from dit_video.sampling.plan import SamplingPlan, StepTransform
from dit_video.sampling.sampling_config import Sampling
from dit_video.tokens import (
    Field,
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
    unpatchify,
)

START_LATENTS = "start_latents"
"""Name of the field of the latents that sampling starts from."""
IMAGE = "image"
"""Name of the known frames among the conditions of guidance: the fields of their latents and of their image tokens."""
ClipLatents = Float32[np.ndarray, "_ _ _ c"]
"""Latents `t h w c` of one clip."""
Members = Sequence[Sequence[int]]
"""Requests of each row, by number."""


class SamplingRequest(NamedTuple):
    """A request of one video's latents."""

    prompt: str
    """Text prompt."""
    negative: str
    """Prompt of the unconditional branch of guidance; empty for none."""
    noise: Float32[np.ndarray, "t h w c"]
    """Initial noise, of the size of the result with the plan's `leading_frames`."""
    plan: SamplingPlan = SamplingPlan()
    seed: int = 0
    """Seed of the noise that stochastic samplers, and conditioning, add."""

    @property
    def decoded_grid(self) -> Grid:
        """Return the size of the latents that are decoded."""
        grid = Grid(*self.noise.shape[:3])
        grid = grid._replace(t=grid.t - self.plan.leading_frames)
        decoding = self.plan.decoding
        return grid if decoding is None else grid._replace(t=len(decoding.list_frames(grid.t)))

    def get_token_grid(self, patch: Grid) -> Grid:
        """Return the size of the video in tokens.

        Raises:
          UserError: If the patch does not divide it.
        """
        return compute_token_grid(Grid(*self.noise.shape[:3]), patch)

    def branches(self, dropped: Sequence[str]) -> list[tuple[str, Mapping[Field, np.ndarray]]]:
        """Return the prompt and the fields of each branch of guidance.

        Args:
          dropped: Names of the conditions that branches after the first lack, each one more than that before. What is
            dropped is as in training: the negative prompt instead of the prompt, and zeros instead of other values.

        Raises:
          UserError: If the clip has no condition of a name.
        """
        prompt, fields = self.prompt, self.fields
        branches = [(prompt, fields)]
        for name in dropped:
            own = {name, COND_LATENTS, IMAGE_TOKENS} if name == IMAGE else {name}
            if name == TEXT:
                prompt = self.negative
            elif own.isdisjoint(field.name for field in fields):
                raise UserError(f"guidance of {name} is invalid: the model has no such condition. Leave out its scale.")
            else:
                fields = {
                    field: np.zeros_like(values) if field.name in own else values for field, values in fields.items()
                }
            branches.append((prompt, fields))
        return branches

    @property
    def fields(self) -> Mapping[Field, np.ndarray]:
        """Return the fields of its plan, with the start latents."""
        if self.plan.start is None:
            return self.plan.fields
        start = Field(name=START_LATENTS, alignment="grid", shape=self.plan.start.shape[-1:])
        return {**self.plan.fields, start: self.plan.start}


class SamplingBatch(NamedTuple):
    """The inputs of the compiled program."""

    branches: tuple[PackedBatch, ...]
    """Rows: those of each branch, or a single one with all branches."""
    branch_positions: Int32[AnyArray, "branches B N"] | None
    """Position of each token's counterpart in every branch, if rows hold all of them."""
    keys: UInt32[AnyArray, "B G words"]
    """Key of each segment, for the noise of stochastic samplers."""


class PlannedBatch(NamedTuple):
    """Rows of requests that are sampled together."""

    requests: Sequence[SamplingRequest]
    """All requests."""
    patch: Grid
    row_requests: Sequence[Sequence[int]]
    """Requests of each row, by number."""
    batch: SamplingBatch
    is_side_by_side: bool
    """True if all branches of guidance are in one row."""
    sample_times: SampleTimes
    """Times of all steps."""
    first_step: int
    """Number of the first step that is taken."""
    transform: StepTransform | None
    resample: int
    """Number of times that every block of steps is taken."""

    @property
    def times(self) -> Float32[np.ndarray, " steps"]:
        """Return the times of the steps that are taken, and the last one."""
        return np.asarray(self.sample_times.times, np.float32)[self.first_step :]

    @property
    def has_updates(self) -> bool:
        """Return whether latents are changed between blocks of steps."""
        return any(self.requests[index].plan.update is not None for row in self.row_requests for index in row)

    def draw_noise(self, number: int) -> Float[Array, "B N p"]:
        """Return standard normal noise of a number, of each clip by its seed."""
        rows, keys = self.batch.branches[0], jax.random.wrap_key_data(jnp.asarray(self.batch.keys))
        number_keys = jax.vmap(jax.vmap(lambda each: jax.random.fold_in(each, number)))(keys)
        return rows.layout.sample_noise(number_keys, rows.tokens.shape[-1])

    def unpack_latents(self, tokens: Any) -> dict[int, ClipLatents]:
        """Return the latents of every request's clip in rows of tokens, by its number."""
        values = to_host(tokens)
        return {
            index: unpatchify(values[row, slots[0]], grid, self.patch)[self.requests[index].plan.leading_frames :]
            for index, row, slots, grid in self._iterate_slots()
        }

    def pack_latents(self, tokens: Any, latents: Mapping[int, ClipLatents]) -> Float32[np.ndarray, "B N p"]:
        """Return rows of tokens with the latents of these requests in place, in all branches that the rows hold."""
        values = np.array(to_host(tokens), np.float32)
        for index, row, slots, grid in self._iterate_slots():
            if index not in latents:
                continue
            first = self.requests[index].plan.leading_frames * (grid.h * grid.w) // self.patch.t
            for slot in slots:
                values[row, slot[first:]] = patchify(latents[index], self.patch)
        return values

    def _iterate_slots(self) -> Iterator[tuple[int, int, list[np.ndarray], Grid]]:
        """Yield each request's number, its row, the positions of its tokens in every branch, and their grid."""
        segments = np.asarray(self.batch.branches[0].segments)
        for number, row in enumerate(self.row_requests):
            copies = int(segments[number].max(axis=0)) // len(row)
            for slot, index in enumerate(row):
                grid = self.requests[index].get_token_grid(self.patch)
                ids = range(slot * copies + 1, (slot + 1) * copies + 1)
                yield index, number, [np.flatnonzero(segments[number] == i)[: grid.volume] for i in ids], grid


def embed_prompts(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], sampling: Sampling
) -> dict[str, CaptionTokens]:
    """Return the tokens of all prompts; raise UserError for guidance of two experts if the model has one."""
    guidance = sampling.guidance
    sampling.check_experts(len(denoiser.experts))
    prompts = dict.fromkeys(prompt for request in requests for prompt, _ in request.branches(guidance.dropped))
    return denoiser.embed(prompts)


def plan_batches(
    denoiser: Denoiser,
    requests: Sequence[SamplingRequest],
    texts: Mapping[str, CaptionTokens],
    sampling: Sampling,
    shape: LayoutShape,
    rows: int,
) -> Iterator[PlannedBatch]:
    """Yield the batches of all requests.

    Raises:
      UserError: If a size, a text or a plan does not fit.
    """
    guidance, patch, mesh = sampling.guidance, denoiser.patch, denoiser.mesh
    conditions = [request.branches(guidance.dropped) for request in requests]
    sizes = [
        RequestSize(
            request.get_token_grid(patch),
            tuple(len(texts[prompt]) for prompt, _ in branches),
            0 if request.plan.extra is None else len(request.plan.extra.noise),
        )
        for request, branches in zip(requests, conditions, strict=True)
    ]
    # Requests are sampled together if they take the same steps: all of a task, unless times depend on the size.
    groups: dict[PlannedSteps, list[int]] = {}
    for index, (request, size) in enumerate(zip(requests, sizes, strict=True)):
        clip_size = ClipSize(frames=size.grid.t, frame_tokens=size.grid.h * size.grid.w)
        groups.setdefault(plan_steps(request, denoiser.process.specialize(clip_size), sampling), []).append(index)
    is_batched = sampling.branch_evaluation == "together"
    multiples = compute_row_multiples(mesh, guidance, is_batched=is_batched)
    # The branch without some layers is the first one alone, so that others must not lie in its rows.
    can_share_rows = is_batched and guidance.skip_layers is None
    # Outside of the interval other branches would change the state of a row, which waits for them in rows of their own.
    can_share_rows = can_share_rows and not (guidance.interval is not None and denoiser.config.has_sampling_state)
    options: dict[str, Any] = {"rows": rows, "is_batched": can_share_rows, "multiples": multiples}
    for steps, indices in groups.items():
        fields = dict.fromkeys(field for index in indices for field in requests[index].fields)
        if steps.transform is not None:
            fields |= dict.fromkeys(steps.transform.list_fields(requests[indices[0]].noise.shape[-1]))
        sample_times = sampling.make_times(steps.process)
        for group in plan_rows([sizes[index] for index in indices], shape, **options):
            batch_rows = multiples.round_up(rows, is_side_by_side=group.is_side_by_side)
            if mesh is not None:
                group = group._replace(shape=group.shape.pad_tokens(mesh.shape["context"]))
            packer = Packer(
                requests,
                texts,
                patch=patch,
                token_dt=denoiser.token_dt,
                dropped=guidance.dropped,
                rows=batch_rows,
                fields=tuple(fields),
                token_lead=denoiser.token_lead,
            )
            for start in range(0, len(group.rows), batch_rows):
                members = [[indices[position] for position in row] for row in group.rows[start : start + batch_rows]]
                yield PlannedBatch(
                    requests=requests,
                    patch=patch,
                    row_requests=members,
                    batch=packer.make_batch(group, members),
                    is_side_by_side=group.is_side_by_side,
                    sample_times=sample_times,
                    first_step=steps.first,
                    transform=steps.transform,
                    resample=steps.resample,
                )


class PlannedSteps(NamedTuple):
    """The steps of a request."""

    process: Process
    """Process for clips of its size, which the times depend on."""
    first: int
    has_start: bool
    transform: StepTransform | None
    resample: int
    has_update: bool


def plan_steps(request: SamplingRequest, process: Process, sampling: Sampling) -> PlannedSteps:
    """Return the steps of a request.

    Args:
      request: The request.
      process: Process for clips of its size.
      sampling: Steps and schedule.

    Raises:
      UserError: If the start does not fit the clip, or no step begins at it.
    """
    plan, first = request.plan, 0
    if plan.start is not None:
        if plan.start.shape != request.noise.shape:
            shapes = f"{list(plan.start.shape)}, those of the clip {list(request.noise.shape)}"
            raise UserError(f"start is invalid: its latents are {shapes}. Encode a clip of the size that is requested.")
        times = np.asarray(sampling.make_times(process).times)
        first = int((times[:-1] > np.float32(plan.start_time)).sum())
        if first == sampling.steps:
            raise UserError(
                f"strength or start_time={plan.start_time} is invalid: no step begins at or below it. Use at least "
                f"{times[-2]:.3g}, or more steps."
            )
    elif plan.start_time < 1:
        raise UserError(f"start_time={plan.start_time} is invalid without start latents. Use 1, or give start.")
    has_start, has_update = plan.start is not None, plan.update is not None
    return PlannedSteps(process, first, has_start, plan.transform, plan.resample, has_update)


class RequestSize(NamedTuple):
    """The size of one request."""

    grid: Grid
    """Number of tokens along (t, h, w)."""
    texts: tuple[int, ...]
    """Number of text tokens of each branch."""
    extra: int = 0
    """Number of extra tokens."""

    @property
    def row_grid(self) -> Grid:
        """Return the size that a row must have room for."""
        return Grid(1, 1, self.grid.volume + self.extra) if self.extra else self.grid


class RowMultiples(NamedTuple):
    """Divisors of the number of rows that are sampled at once, so that several devices can share them."""

    separate: int = 1
    """Divisor where the branches of a request are in rows of their own."""
    side_by_side: int = 1
    """Divisor where they lie side by side in a row."""

    def round_up(self, rows: int, *, is_side_by_side: bool) -> int:
        """Return the smallest number of rows that is not smaller and has the divisor."""
        multiple = self.side_by_side if is_side_by_side else self.separate
        return rows + -rows % multiple


def compute_row_multiples(mesh: AnyMesh | None, guidance: Guidance, *, is_batched: bool) -> RowMultiples:
    """Return what the number of rows has to be a multiple of, so that the devices share all that a model evaluates.

    Branches that are evaluated together are further rows, unless the first one is evaluated alone: at some times, or
    without some layers.
    """
    if mesh is None:
        return RowMultiples()
    shards = count_row_shards(mesh)
    counts = {guidance.count_branches(expert) for expert in range(guidance.expert_count)}
    if guidance.interval is not None or guidance.skip_layers is not None or not is_batched:
        counts = {1}
    return RowMultiples(math.lcm(*(shards // math.gcd(shards, count) for count in counts)), shards)


class PackedRequests(NamedTuple):
    """Requests in rows or canvases of one shape."""

    shape: LayoutShape
    """Shape of a row."""
    is_side_by_side: bool
    """True if the branches of a request lie side by side in its row, instead of in rows of their own."""
    rows: list[list[int]]
    """Requests of each row, by number."""


def plan_rows(
    sizes: Sequence[RequestSize],
    shape: LayoutShape,
    *,
    rows: int,
    is_batched: bool,
    multiples: RowMultiples = RowMultiples(),  # noqa: B008 (a value)
) -> list[PackedRequests]:
    """Return the requests, by number, in rows or canvases by first fit, the largest first.

    A request that is larger than a row gets one of its own.

    Args:
      sizes: Sizes of all requests.
      shape: Shape of a row.
      rows: Number of rows that are sampled at once.
      is_batched: Evaluates all branches of a request at once.
      multiples: Divisors of the number of rows, which is rounded up to them.

    Raises:
      UserError: If a text is longer than a row's.
    """
    for size in sizes:
        if max(size.texts) > shape.text:
            length = max(size.texts)
            raise UserError(f"a prompt of {length} text tokens is longer than a row's {shape.text}; shorten the prompt")
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index].row_grid.volume)
    separate = [_Bundle([size.row_grid], [max(size.texts)]) for size in sizes]
    small = [index for index in order if separate[index].fits(shape)]
    branches = max((len(size.texts) for size in sizes), default=1)
    groups = [PackedRequests(shape, False, _pack_first_fit(small, separate, shape))]
    # Requests whose branches fit a row together can have them side by side; the others stay in separate rows. The plan
    # that evaluates fewer rows, padding rows included, is taken.
    if is_batched and branches > 1:
        bundles = [_Bundle([size.row_grid] * branches, list(size.texts)) for size in sizes]
        fitting = [index for index in small if bundles[index].fits(shape)]
        remaining = [index for index in small if index not in set(fitting)]
        combined = [
            PackedRequests(shape, True, _pack_first_fit(fitting, bundles, shape)),
            PackedRequests(shape, False, _pack_first_fit(remaining, separate, shape)),
        ]
        groups = min(combined, groups, key=lambda plan: _count_evaluated_rows(plan, rows, branches, multiples))
    for index in (index for index in order if index not in set(small)):
        row_shape = shape.enlarge(sizes[index].row_grid)
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


def _count_evaluated_rows(
    groups: Sequence[PackedRequests], rows: int, branch_count: int, multiples: RowMultiples
) -> int:
    """Return the number of rows that the model evaluates per step, including padding rows of the last batch."""
    count = 0
    for group in groups:
        batch_rows = multiples.round_up(rows, is_side_by_side=group.is_side_by_side)
        copies = 1 if group.is_side_by_side else branch_count
        count += -(-len(group.rows) // batch_rows) * batch_rows * copies
    return count


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
    dropped: Sequence[str]
    """Names of the conditions that guidance drops."""
    rows: int
    """Number of rows of a batch; padding rows fill it up, so that its shape is constant."""
    fields: tuple[Field, ...] = ()
    """Fields of the rows; zero for a request whose plan lacks them."""
    token_lead: float = 0.0
    """Fraction of `token_dt` by which all tokens but a clip's first begin earlier."""

    @property
    def branch_count(self) -> int:
        """Return the number of guidance branches."""
        return len(self.dropped) + 1

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
        for number, row in enumerate(row_requests):
            for index in row:
                conditions = self.requests[index].branches(self.dropped)
                items[number] += [self._make_example(index, *conditions[branch]) for branch in branches]
        first = items[0][0]
        contents: dict[str, Any] = {
            "width": first.tokens.shape[1],
            "text_width": first.text.shape[1] if first.text.ndim == 2 else 0,
            "fields": [field.to_rows(self.patch) for field in self.fields],
        }
        packed = [pack(row, group.shape, **contents) for row in items]
        packed += [make_empty_row(group.shape, **contents)] * (self.rows - len(packed))
        return stack_rows(packed)

    def _make_example(self, index: int, prompt: str, fields: Mapping[Field, np.ndarray]) -> PackedExample:
        """Return a branch of a request: its tokens, with extra ones after them, and its fields in rows."""
        request = self.requests[index]
        extra, latents = request.plan.extra, Grid(*request.noise.shape[:3])
        tokens, step = patchify(request.noise, self.patch), (self.token_dt, 1.0, 1.0)
        positions = compute_positions(request.get_token_grid(self.patch), step=step, lead=self.token_lead)
        row_fields = {}
        for field in self.fields:
            values = fields.get(field, np.zeros(field.get_shape(latents), field.dtype))
            row_fields[field.name] = field.patchify(values, self.patch)
            if extra is not None and field.alignment == "grid":
                shape = (len(extra.noise), *row_fields[field.name].shape[1:])
                further = extra.fields.get(field, np.zeros(shape, field.dtype))
                row_fields[field.name] = np.concatenate([row_fields[field.name], further])
        if extra is not None:
            tokens = np.concatenate([tokens, extra.noise])
            positions = np.concatenate([positions, extra.positions])
        return PackedExample(tokens, positions, self.texts[prompt], index, row_fields)

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
