"""The compiled sampler of packed rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dit_video.backbones.denoise import packed_denoise
from dit_video.diffusion import Branches, Denoise, Prediction, Process, Watched, advance, apart, batched, guided
from dit_video.generation.given import GivenRows
from dit_video.generation.rows import Batch
from dit_video.tokens import Rows, packed_noise, segment_mean, to_tokens

LEAST_STEPS = 64
"""What a program has room for, at least."""


def steps_of_program(steps: int) -> int:
    """How many steps the program has room for that samples with `steps`: steps that are not taken cost nothing."""
    room = LEAST_STEPS
    while room < steps:
        room *= 2
    return room


@functools.lru_cache(maxsize=16)
def program_of(
    dit: nnx.GraphDef, text: nnx.GraphDef, process: Process, prediction: Prediction, solver: Watched, together: bool
):
    """The jitted `run(params, state, batch, strength, grid, first)`: to the solver's state at the last of the times.

    It is compiled once for a shape of rows and a kind of guidance, whatever the prompts, seeds, numbers and steps.
    """

    @jax.jit
    def run(params, state, batch: Batch, strength, grid, first):
        def forward(rows: Rows, given: GivenRows) -> Denoise:
            context = nnx.merge(text, params["text"])(rows.text, rows.text_segments)
            denoise = packed_denoise(
                nnx.merge(dit, params["dit"]),
                segments=rows.segments,
                coordinates=rows.coordinates,
                context=context.values,
                context_segments=context.segments,
                count=rows.examples.shape[1],
                given=given.given._replace(labels=context.classes(rows.examples.shape[1])),
            )
            return given.held(denoise, process)

        rows = batch.branches[0][0]

        def mean(values):
            """Of every sample, one for each of its tokens."""
            means = segment_mean(values.mean(axis=-1), rows.segments, count=rows.examples.shape[1])
            return to_tokens(means, rows.segments)[..., None]

        def guided_model() -> Denoise:
            number = len(batch.branches)
            conditional = forward(*batch.branches[0]) if strength.interval is not None or number == 1 else None
            branches: Branches
            if batch.places is not None:
                assert conditional is not None
                whole, conditional = conditional, None
                branches = lambda noisy, time: _counterparts(whole(noisy, time), batch.places)  # noqa: E731
            elif together:
                everything = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batch.branches)
                branches = batched(forward(*everything), number)
            else:
                branches = apart(*(forward(*branch) for branch in batch.branches))
            return guided(
                branches, strength, conditional=conditional, mean=mean, process=process, prediction=prediction
            )

        def draw(number):
            keys = jax.random.wrap_key_data(jnp.asarray(batch.keys))
            return packed_noise(rows, jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(keys))

        denoise = forward(*batch.branches[0]) if strength is None else guided_model()
        return advance(
            denoise,
            state,
            grid.times,
            process=process,
            solver=solver,
            prediction=prediction,
            told=grid.told,
            draw=draw,
            first=first,
        )

    return run


def _counterparts(predicted: Array, places: Any) -> list[Array]:
    """Of each branch, at every token."""
    return [jnp.take_along_axis(predicted, place[..., None], axis=1) for place in places]
