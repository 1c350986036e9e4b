"""Planning of sampling: requests that take the same steps, packed into the rows of batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.diffusion import ClipSize, Process, SampleTimes
from dit_video.distributed.gather import to_host
from dit_video.models.encoders import CaptionTokens
from dit_video.sampling.denoiser import Denoiser
from dit_video.sampling.packing import Packer, RequestSize, SamplingBatch, SamplingRequest, plan_rows
from dit_video.sampling.plan import StepTransform
from dit_video.sampling.sampling_config import Sampling
from dit_video.sampling.sharding import compute_row_multiples
from dit_video.tokens import Grid, LayoutShape, patchify, unpatchify

ClipLatents = Float32[np.ndarray, "_ _ _ c"]
"""Latents `t h w c` of one clip."""


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
    guidance = sampling.full_guidance
    sampling.check_experts(len(denoiser.experts))
    prompts = dict.fromkeys(prompt for request in requests for prompt, _ in request.branches(guidance.branch_count))
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
      UserError: a size, a text or a plan that does not fit.
    """
    guidance, patch, mesh = sampling.full_guidance, denoiser.patch, denoiser.mesh
    conditions = [request.branches(guidance.branch_count) for request in requests]
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
                branch_count=guidance.branch_count,
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
      request: the request.
      process: process for clips of its size.
      sampling: steps and schedule.

    Raises:
      UserError: a start that does not fit the clip, or that no step begins at.
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
