"""The compiled sampler of packed rows: its arguments, their conditioning, and their sharding on a mesh.

Rows are sharded over `data` and `fsdp`: clips, and the branches of guidance where these are evaluated together; tokens
over `context`, and weights as in training. Plans compile the program with the same shardings.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, Key

from dit_video.core.errors import UserError
from dit_video.core.trees import map_with_path
from dit_video.core.typing import AnyArray
from dit_video.diffusion import (
    Branches,
    DenoiseFn,
    GuidanceState,
    Prediction,
    Process,
    SampleTimes,
    SamplingState,
    Solver,
    advance,
    alone,
    apply_guidance,
    batched,
    sequential,
)
from dit_video.distributed import count_row_shards, make_shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.distributed.sharding import ROW_AXES
from dit_video.models.backbones.denoise import adapt_prediction, make_denoise_fn, make_text_record
from dit_video.models.backbones.protocol import Backbone, BackboneConfig
from dit_video.models.backbones.skipped_layers import skip_layers
from dit_video.models.conditioning import (
    COND_LATENTS,
    IMAGE_TOKENS,
    ClipConditioning,
    Conditioning,
    ConditioningLatents,
    make_image_tokens,
)
from dit_video.models.encoders import Context
from dit_video.sampling.packing import SamplingBatch
from dit_video.sampling.plan import StepInputs, StepTransform
from dit_video.tokens import Field, PackedBatch

MIN_PROGRAM_STEPS = 64
"""Smallest number of steps that a program is compiled for."""


class ProgramArguments(NamedTuple):
    """The arguments of the compiled sampler: arrays, or their shapes or shardings."""

    params: Any
    """Parameters of the denoiser and of its text encoder."""
    state: SamplingState | None
    """State before the first step; None if it is not known yet."""
    batch: SamplingBatch
    guidance: Any
    """Parameters of guidance; None without it."""
    sample_times: SampleTimes
    first: Any
    """Number of the first step."""


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
            start = None if skipped_layers is not None else init_rows_state(model.config, branch)
            traced, constants = jax.closure_convert(denoise, branch.tokens, jnp.zeros(()), start)
            sharding = None if mesh is None else make_row_shardings(branch, mesh).tokens
            return lambda noisy, time, state: traced(_constrain(noisy, sharding), time, state, *constants)

        def mean(values):
            """Return the mean of every sample, repeated for its tokens."""
            return rows.layout.expand(rows.layout.mean(values.mean(axis=-1)))[..., None]

        def draw(number):
            step_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(keys)
            return rows.layout.sample_noise(step_keys, rows.tokens.shape[-1])

        def change_sample(sample, time, number):
            assert transform is not None
            start = sample_times.model_times[number - first]
            return transform.change_sample(sample, StepInputs(rows, process, time, draw(number), start))

        kinds: dict[str, Any] = {"process": process, "prediction": adapt_prediction(prediction, rows.layout)}
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
                stacked = stack_branches(batch)
                stacked = _constrain(stacked, None if mesh is None else make_row_shardings(stacked, mesh))
                branches = batched(make_denoise(stacked), number)
            else:
                branches = sequential(*map(make_denoise, batch.branches))
            skipped = None if guidance.skip is None else make_denoise(rows, guidance.skip.layers)
            single = None if conditional is None else alone(conditional, is_batched=is_batched)
            denoise = apply_guidance(branches, guidance, conditional=single, skipped=skipped, mean=mean, **kinds)
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


def stack_branches(batch: SamplingBatch) -> PackedBatch:
    """Return the rows of all branches, one branch after the other."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *batch.branches)


def start_model(
    state: SamplingState, config: BackboneConfig, batch: SamplingBatch, guidance: Any, *, is_batched: bool
) -> SamplingState:
    """Return the sampler's state with that of the model before its first step, as the program carries it.

    Args:
      state: State of the sampler; momentum of guidance in it is kept.
      config: Config of the model.
      batch: Rows of the program.
      guidance: Parameters of guidance; None without it.
      is_batched: True if branches are evaluated together.

    Raises:
      UserError: If the model's state has no axis of the rows.
    """
    if not config.has_sampling_state:
        return state
    first, *others = batch.branches
    if guidance is None or batch.branch_positions is not None:
        own = init_rows_state(config, first)
    elif others and is_batched:
        own = init_rows_state(config, stack_branches(batch))
    else:
        own = tuple(init_rows_state(config, branch) for branch in batch.branches)
    if not jax.tree.leaves(own):
        return state
    if guidance is None:
        return state._replace(denoiser=own)
    guided = state.denoiser if isinstance(state.denoiser, GuidanceState) else GuidanceState()
    return state._replace(denoiser=guided._replace(branches=own))


def init_rows_state(config: BackboneConfig, rows: PackedBatch) -> Any:
    """Return a model's state of rows before the first step; None if it has none.

    Raises:
      UserError: If it has no axis of the rows.
    """
    state, count = config.init_sampling_state(rows), len(rows.tokens)
    for leaf in jax.tree.leaves(state):
        if jnp.shape(leaf)[:1] != (count,):
            raise UserError(
                f"init_sampling_state of {type(config).__name__} is invalid: an array has the shape {jnp.shape(leaf)}, "
                f"and its first axis must be the {count} rows. Use jnp.broadcast_to for values that all rows share."
            )
    return state


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
      model: The backbone.
      context: Texts of the rows, encoded.
      rows: Rows of requests with their fields.
      keys: Keys of the requests' seeds.
      process: Process of the model.
      transform: Change of its inputs.
    """
    conditioning = make_conditioning(rows, model.config.conditioning, keys).add(make_text_record(context, rows.layout))
    change = None
    is_clean: Array | None = jnp.zeros(rows.segments.shape, bool)
    if transform is not None:
        is_clean = transform.get_clean_tokens(rows)
        change = functools.partial(transform.change_input, rows=rows, process=process)
    return make_denoise_fn(model, rows.layout, conditioning, change_input=change, is_clean=is_clean)


def make_conditioning(batch: PackedBatch, configs: Sequence[ClipConditioning], keys: Key[Array, "B G"]) -> Conditioning:
    """Return the records of the fields that a model reads; `configs` describe some of them.

    Args:
      batch: Rows with the fields of requests.
      configs: Conditioning of the model by fields.
      keys: Keys of the requests' seeds.
    """
    fields, layout = batch.fields, batch.layout
    conditioning = Conditioning()
    for each in configs:
        name = each.field.name
        own_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, zlib.crc32(name.encode()))
        values, strength = (jnp.asarray(fields[field.name]) for field in list_fields(each))
        conditioning = conditioning.add(each.prepare(values, layout, own_keys, strength))
    if COND_LATENTS in fields:
        conditioning = conditioning.add(ConditioningLatents(jnp.asarray(fields[COND_LATENTS])))
    if IMAGE_TOKENS in fields:
        conditioning = conditioning.add(make_image_tokens(fields[IMAGE_TOKENS], layout))
    return conditioning


def list_fields(config: ClipConditioning) -> tuple[Field, Field]:
    """Return the fields of requests for a conditioning: its values, and their strength."""
    return config.field, Field(name=f"{config.field.name}_strength", alignment="example", shape=config.strength_shape)


def make_argument_shardings(arguments: ProgramArguments, mesh: AnyMesh) -> ProgramArguments:
    """Return the sharding of every argument: parameters as in training, rows and tokens, and all else replicated."""
    rows, tokens = arguments.batch.branches[0].tokens.shape[:2]
    replicated = NamedSharding(mesh, PartitionSpec())
    row_axis, token_axis = _choose_axes(rows, tokens, mesh)

    def shard_samples(leaf: Any) -> NamedSharding:
        """Return the sharding of a part of the solver's state: a token's values on its last axis, or no tokens."""
        if leaf.ndim < 3 or tuple(leaf.shape[-3:-1]) != (rows, tokens):
            return replicated
        return NamedSharding(mesh, PartitionSpec(*(None,) * (leaf.ndim - 3), row_axis, token_axis))

    def shard_rows(leaf: Any) -> NamedSharding:
        """Return the sharding of a part of the denoiser's state: the first axis is rows, perhaps of all branches."""
        if not leaf.ndim or leaf.shape[0] % rows:
            return replicated
        row_axis, token_axis = _choose_axes(leaf.shape[0], tokens, mesh)
        return NamedSharding(mesh, PartitionSpec(row_axis, *((token_axis,) if leaf.shape[1:2] == (tokens,) else ())))

    state = None
    if arguments.state is not None:
        state = jax.tree.map(shard_samples, arguments.state)
        state = state._replace(denoiser=jax.tree.map(shard_rows, arguments.state.denoiser))
    positions: Any = NamedSharding(mesh, PartitionSpec(None, row_axis, token_axis))
    keys: Any = NamedSharding(mesh, PartitionSpec(row_axis))
    batch = SamplingBatch(
        branches=tuple(make_row_shardings(branch, mesh) for branch in arguments.batch.branches),
        branch_positions=None if arguments.batch.branch_positions is None else positions,
        keys=keys,
    )
    rest = jax.tree.map(lambda _: replicated, (arguments.guidance, arguments.sample_times, arguments.first))
    return ProgramArguments(make_shardings(arguments.params, mesh), state, batch, *rest)


def make_row_shardings(batch: PackedBatch, mesh: AnyMesh) -> PackedBatch:
    """Return the sharding of a batch's rows and tokens; axes that the devices do not divide are replicated."""
    rows, tokens = batch.tokens.shape[:2]
    row_axis, token_axis = _choose_axes(rows, tokens, mesh)

    def layout(path: str, leaf: Any) -> NamedSharding:
        is_tokens = path in ("tokens", "layout/segments", "layout/positions")
        return NamedSharding(mesh, PartitionSpec(row_axis, *((token_axis,) if is_tokens else ())))

    return map_with_path(layout, batch)


def _choose_axes(rows: int, tokens: int, mesh: AnyMesh) -> tuple[tuple[str, ...] | None, str | None]:
    """Return the mesh axes that shard rows and tokens; None where they do not divide these."""
    row_axes = ROW_AXES if rows % count_row_shards(mesh) == 0 else None
    return row_axes, "context" if tokens % mesh.shape["context"] == 0 else None


def put_on_devices(tree: Any, shardings: Any) -> Any:
    """Put arrays on the devices of a mesh, each process on its own; arrays that are there stay as they are.

    Each process passes the same values.
    """
    return jax.tree.map(_put_array, tree, shardings)


def _put_array(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array):
        if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if jax.process_count() == 1 or not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
    # `device_put` of an array of several processes would first compare their values.
    values = np.asarray(leaf)
    values = values.astype(jax.dtypes.canonicalize_dtype(values.dtype), copy=False)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
