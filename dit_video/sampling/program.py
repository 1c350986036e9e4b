"""The compiled sampler of packed rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int32, Key

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
from dit_video.distributed.mesh import AnyMesh
from dit_video.models.backbones.denoise import make_denoise_fn, make_text_record
from dit_video.models.backbones.protocol import Backbone
from dit_video.models.backbones.skipped_layers import skip_layers
from dit_video.models.encoders import Context
from dit_video.sampling.conditioning import make_conditioning
from dit_video.sampling.packing import SamplingBatch
from dit_video.sampling.plan import StepInputs, StepTransform
from dit_video.sampling.sharding import make_row_shardings
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


def make_rows_denoise(
    model: Backbone,
    context: Context,
    rows: PackedBatch,
    keys: Key[Array, "B G"],
    process: Process,
    transform: StepTransform | None,
) -> DenoiseFn:
    """Return the `denoise` of rows, of noisy tokens and one time.

    Args:
      model: the backbone.
      context: texts of the rows, encoded.
      rows: rows of requests with their fields.
      keys: keys of the requests' seeds.
      process: process of the model.
      transform: change of its inputs.
    """
    conditioning = make_conditioning(rows, model.config.conditioning, keys).add(make_text_record(context, rows.layout))
    change = None
    is_clean: Array | None = jnp.zeros(rows.segments.shape, bool)
    if transform is not None:
        is_clean = transform.get_clean_tokens(rows)
        change = functools.partial(transform.change_input, rows=rows, process=process)
    return make_denoise_fn(model, rows.layout, conditioning, change_input=change, is_clean=is_clean)


@functools.lru_cache(maxsize=16)
def make_program(
    backbone: nnx.GraphDef,
    text: nnx.GraphDef,
    process: Process,
    prediction: Prediction,
    solver: Solver,
    transform: StepTransform | None,
    is_batched: bool,
    mesh: AnyMesh | None,
):
    """Return the jitted `run(params, state, batch, guidance, sample_times, first)`.

    It returns the `SamplingState` at the last time. It is compiled once per shape of rows and kind of guidance, for
    all prompts, seeds, scales and numbers of steps. On a mesh, for which `backbone` is made, the devices share the
    branches that are evaluated at once.
    """

    @jax.jit
    def run(params, state, batch: SamplingBatch, guidance, sample_times, first):
        # All branches have the same noise, segments and positions. The sample is that of the first.
        rows = jax.tree.map(jnp.asarray, batch.branches[0])
        keys = jax.random.wrap_key_data(jnp.asarray(batch.keys))

        def make_denoise(branch: PackedBatch, skipped_layers: Any = None) -> DenoiseFn:
            context = nnx.merge(text, params["text"])(branch.text, branch.text_segments)
            model = nnx.merge(backbone, params["backbone"])
            if skipped_layers is not None:
                model = skip_layers(model, skipped_layers)
            copies = len(branch.tokens) // len(rows.tokens)
            branch_keys = jnp.concatenate([keys] * copies)
            denoise = make_rows_denoise(model, context, branch, branch_keys, process, transform)
            # Traced once, however often the solver and guidance evaluate it.
            traced, constants = jax.closure_convert(denoise, branch.tokens, jnp.zeros(()), None)
            sharding = None if mesh is None else make_row_shardings(branch, mesh).tokens
            return lambda noisy, time, state: traced(_constrain(noisy, sharding), time, state, *constants)

        def mean(values):
            """Return the mean of every sample, repeated for its tokens."""
            return rows.layout.expand(rows.layout.mean(values.mean(axis=-1)))[..., None]

        def compute_quantile(values, quantile):
            return rows.layout.expand(rows.layout.quantile(values, quantile))[..., None]

        def draw(number):
            step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(keys)
            return rows.layout.sample_noise(step_keys, rows.tokens.shape[-1])

        def change_sample(sample, time, number):
            assert transform is not None
            start = sample_times.model_times[number - first]
            return transform.change_sample(sample, StepInputs(rows, process, time, draw(number), start))

        kinds: dict[str, Any] = {"process": process, "prediction": prediction.with_quantile(compute_quantile)}
        number = len(batch.branches)
        # Outside of the guidance interval the conditional branch alone is evaluated. With all branches of a request
        # in one row (number == 1) it is the whole row, and guidance only combines tokens of its output.
        is_alone = guidance is None or guidance.interval is not None or number == 1
        conditional = make_denoise(rows) if is_alone else None
        if guidance is None:
            assert conditional is not None
            denoise = conditional
        else:
            branches: Branches
            if batch.branch_positions is not None:
                assert conditional is not None
                branches, conditional = _gather_branches(conditional, batch.branch_positions), None
            elif number == 1:
                assert conditional is not None
                branches, conditional = sequential(conditional), None
            elif is_batched:
                stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batch.branches)
                stacked = _constrain(stacked, None if mesh is None else make_row_shardings(stacked, mesh))
                branches = batched(make_denoise(stacked), number)
            else:
                branches = sequential(*map(make_denoise, batch.branches))
            skipped = None if guidance.skip is None else make_denoise(rows, guidance.skip.layers)
            denoise = apply_guidance(branches, guidance, conditional=conditional, skipped=skipped, mean=mean, **kinds)
        options: dict[str, Any] = {"model_times": sample_times.model_times, "noise_fn": draw, "first_step": first}
        change = None if transform is None else change_sample
        return advance(denoise, state, sample_times.times, solver=solver, transform=change, **kinds, **options)

    return run


def _constrain(values: Any, shardings: Any) -> Any:
    return values if shardings is None else jax.lax.with_sharding_constraint(values, shardings)


def _gather_branches(denoise: DenoiseFn, positions: Int32[AnyArray, "branches B N"]) -> Branches:
    """Return branches that lie side by side in rows: the prediction of each at every token."""

    def branches(noisy, time, state):
        prediction, next_state = denoise(noisy, time, state)
        return [jnp.take_along_axis(prediction, index[..., None], axis=1) for index in positions], next_state

    return branches
