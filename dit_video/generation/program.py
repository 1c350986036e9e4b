"""The compiled sampler of packed rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Int32

from dit_video.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.core.typing import AnyArray
from dit_video.diffusion import (
    Branches,
    DenoiseFn,
    Prediction,
    Process,
    Solver,
    advance,
    apply_guidance,
    batched,
    sequential,
)
from dit_video.generation.conditioning import hold_clean_tokens, make_conditioning
from dit_video.generation.rows import SamplingBatch
from dit_video.tokens import PackedBatch

MIN_PROGRAM_STEPS = 64
"""Smallest number of steps that a program is compiled for."""


def compute_program_steps(steps: int) -> int:
    """Return the number of steps of the compiled program for `steps` steps: a power of two times the minimum.

    Steps that are not taken cost nothing; see `advance`.
    """
    capacity = MIN_PROGRAM_STEPS
    while capacity < steps:
        capacity *= 2
    return capacity


@functools.lru_cache(maxsize=16)
def make_program(
    backbone: nnx.GraphDef,
    text: nnx.GraphDef,
    process: Process,
    prediction: Prediction,
    solver: Solver,
    is_batched: bool,
):
    """Return the jitted `run(params, state, batch, guidance, sample_times, first)`.

    It returns the `SamplingState` at the last time. It is compiled once per shape of rows and kind of guidance, for
    all prompts, seeds, scales and numbers of steps.
    """

    kinds: dict[str, Any] = {"process": process, "prediction": prediction}

    @jax.jit
    def run(params, state, batch: SamplingBatch, guidance, sample_times, first):
        def forward(rows: PackedBatch) -> DenoiseFn:
            context = nnx.merge(text, params["text"])(rows.text, rows.text_segments)
            model = nnx.merge(backbone, params["backbone"])
            conditioning = make_conditioning(rows, model.config.conditioning)
            conditioning = conditioning.add(make_text_record(context, rows.layout))
            denoise = make_denoise_fn(model, rows.layout, conditioning)
            return hold_clean_tokens(denoise, rows, process)

        # All branches have the same noise, segments and positions. The sample is that of the first.
        rows = batch.branches[0]

        def mean(values):
            """Return the mean of every sample, repeated for its tokens."""
            return rows.layout.expand(rows.layout.mean(values.mean(axis=-1)))[..., None]

        def guided_model() -> DenoiseFn:
            number = len(batch.branches)
            # Outside of the guidance interval the conditional branch alone is evaluated. With all branches of a request
            # in one row (number == 1) it is the whole row, and guidance only combines tokens of its output.
            conditional = forward(batch.branches[0]) if guidance.interval is not None or number == 1 else None
            branches: Branches
            if batch.branch_positions is not None:
                assert conditional is not None
                denoise_rows, conditional = conditional, None
                branches = _gather_branches(denoise_rows, batch.branch_positions)
            elif is_batched:
                stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batch.branches)
                branches = batched(forward(stacked), number)
            else:
                branches = sequential(*(forward(branch) for branch in batch.branches))
            return apply_guidance(branches, guidance, conditional=conditional, mean=mean, **kinds)

        def draw(number):
            keys = jax.random.wrap_key_data(jnp.asarray(batch.keys))
            step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(keys)
            return rows.layout.sample_noise(step_keys, rows.tokens.shape[-1])

        denoise = forward(batch.branches[0]) if guidance is None else guided_model()
        options: dict[str, Any] = {"model_times": sample_times.model_times, "noise_fn": draw, "first_step": first}
        return advance(denoise, state, sample_times.times, solver=solver, **kinds, **options)

    return run


def _gather_branches(denoise: DenoiseFn, positions: Int32[AnyArray, "branches B N"]) -> Branches:
    """Return branches that lie side by side in rows: the prediction of each at every token."""

    def branches(noisy, time, state):
        prediction, next_state = denoise(noisy, time, state)
        return [jnp.take_along_axis(prediction, index[..., None], axis=1) for index in positions], next_state

    return branches
