"""Steps of an experiment as shapes: what training and sampling compile, without computing anything.

A run has the same functions (`training.program`, `experiment.denoiser`, `sampling.program`), with the experiment's own
denoiser, text encoder, loss and optimizer; states and batches are sharded as in a run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from dit_video.core.errors import UserError
from dit_video.core.platform.devices import Platform
from dit_video.core.trees import flatten, map_with_path
from dit_video.data.windows import FittedWindows
from dit_video.diffusion import SampleTimes
from dit_video.distributed import MeshPartitioner, count_row_shards, make_shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.experiment import Experiment, LoraAdapters, Student
from dit_video.experiment.autoencoder import limit_windows, make_autoencoder_step
from dit_video.experiment.denoiser import init_denoiser, make_denoiser_loss, make_denoiser_step, make_init
from dit_video.experiment.initial_weights import make_initial_dtype_fn
from dit_video.experiment.training_config import DenoiserTraining
from dit_video.models.backbones.flops import count_training_passes
from dit_video.models.conditioning import COND_LATENTS, IMAGE_TOKENS, make_mask_fields
from dit_video.models.encoders import ByteEncoderConfig, FrozenTextConfig, TextConfig
from dit_video.models.model_config import ModelConfig
from dit_video.nn import get_graph_def, init_params
from dit_video.planning.costs import StepSpec, count_step_costs
from dit_video.sampling import SamplingRequest
from dit_video.sampling.packing import PackedRequests, Packer, compute_row_multiples
from dit_video.sampling.program import (
    ProgramArguments,
    compute_program_steps,
    list_fields,
    make_argument_shardings,
    make_program,
    start_model,
)
from dit_video.sampling.sampler import init_state
from dit_video.tokens import Field, Grid, make_empty_row
from dit_video.training.state import attach_shardings
from dit_video.training.step import make_step_program
from dit_video.weights import read_clip_vision_config

Part = Literal["denoiser", "autoencoder", "sampler"]
"""Part of an experiment: the training step of one of its two models, or the sampler's program."""

_MIN_CLIP_DIVISOR = 64
"""Inverse of the smallest share of a row that counts as a further clip; a smaller rest is padding."""


class PlannedStep(NamedTuple):
    """A step that can be compiled, with its known costs."""

    step: Callable[..., Any]
    """The jitted step."""
    arguments: tuple[PyTree, ...]
    """Shapes of the arguments, with their shardings."""
    model_flops: int
    """Operations of the model on all devices, without recomputation."""
    sampling_steps: int = 1
    """Number of steps of a sampler."""
    max_steps: int | None = None
    """Largest number of steps that its program supports."""
    branch_passes: int = 1
    """Number of passes of a sampling step: one for each branch of guidance, unless these are evaluated together."""
    costs: StepSpec | None = None
    """Costs of a denoiser that are counted without compiling."""
    layer_bytes: int = 0
    """Bytes of one layer's parameters."""

    @property
    def turns(self) -> int:
        """Return how often the costs are incurred."""
        return self.sampling_steps * self.branch_passes


def fill_row(experiment: Experiment, count: int | None = None) -> list[int]:
    """Return the token counts of the clips that fill a row: `count` equal ones, or as many of the largest as fit.

    What is left of the row is one more clip, unless it is so small a part that it is padding.

    Raises:
      UserError: If more clips are asked for than fit in a row.
    """
    model = experiment.get_model()
    rows = model.row_shape
    if count is not None:
        if not 1 <= count <= min(rows.segments, rows.tokens):
            room = min(rows.segments, rows.tokens)
            raise UserError(f"clips={count} is invalid: a row has room for 1 to {room}; use one of these")
        return [rows.tokens // count + (index < rows.tokens % count) for index in range(count)]
    stride, patch = model.autoencoder.stride, model.backbone.patch
    largest = min(experiment.data.count_max_clip_tokens(stride=stride, patch=patch), rows.tokens)
    full, rest = divmod(rows.tokens, largest)
    clips = [largest] * full + [rest] * (rest * _MIN_CLIP_DIVISOR > rows.tokens)
    return clips[: rows.segments]


def plan_step(
    experiment: Experiment,
    part: Part,
    partitioner: MeshPartitioner,
    *,
    clips: Sequence[int],
    platform: Platform | None = None,
) -> PlannedStep:
    """Return the step of a part of an experiment on a mesh, with rows of clips of these token counts.

    Args:
      experiment: The experiment.
      part: The step.
      partitioner: What the models are made with; its devices need not be present.
      clips: Number of tokens of each clip of a row.
      platform: Platform of the devices, by which attention is counted; the partitioner's by default.

    Raises:
      UserError: If the part is not trained, or rows, heads or tokens are not divisible by the mesh.
    """
    if platform is None:
        platform = partitioner.platform
    match part:
        case "denoiser":
            return _plan_denoiser(experiment, partitioner, clips, platform)
        case "sampler":
            return _plan_sampler(experiment, partitioner, clips, platform)
        case "autoencoder":
            return _plan_autoencoder(experiment, partitioner.mesh)


def _plan_denoiser(
    experiment: Experiment, partitioner: MeshPartitioner, clips: Sequence[int], platform: Platform
) -> PlannedStep:
    config, model, mesh = experiment.denoiser, experiment.get_model(), partitioner.mesh
    caption = _make_empty_caption(model.text_encoder)
    base = make_denoiser_loss(config, model, partitioner, seed=experiment.seed, empty_caption=caption)
    train_step = make_denoiser_step(config, base, mesh=mesh)
    init, frozen = make_init(config, model), tuple[PyTree, ...]()
    if isinstance(config.train, LoraAdapters | Student):
        frozen = (_make_frozen_shapes(config, model),)
    step, arguments = make_step_program(
        train_step, init, _make_batch_shapes(model, config.batch), mesh, frozen_params=frozen
    )
    images = sum(field.length for field in _list_fields(model))
    costs = _count_costs(model, config.batch, clips, platform, training=True, images=images)
    costs = dataclasses.replace(costs, accumulation=config.accumulation_steps)
    return PlannedStep(
        step,
        arguments,
        model_flops=count_training_passes(adapters=config.lora is not None) * costs.forward_flops,
        costs=costs,
        layer_bytes=_count_layer_bytes(model, init),
    )


def _make_frozen_shapes(training: DenoiserTraining, model: ModelConfig) -> dict[str, Any]:
    """Return the shapes of the weights that adapters change, or of a teacher, in a run's dtypes."""
    get_dtype = make_initial_dtype_fn(training, model.backbone)
    shapes = jax.eval_shape(functools.partial(init_denoiser, model), jax.random.key(0))
    return map_with_path(lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, get_dtype(path)), shapes)


def _count_layer_bytes(model: ModelConfig, init: Callable[[Array], dict[str, Any]]) -> int:
    shapes = flatten(jax.eval_shape(init, jax.random.key(0)))
    stacked = [leaf for path, leaf in shapes.items() if "backbone/blocks/" in path]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in stacked) // model.backbone.layers


def _make_empty_caption(text_encoder: TextConfig) -> np.ndarray:
    if isinstance(text_encoder, FrozenTextConfig):
        return np.zeros((1, text_encoder.width), np.float32)
    return text_encoder.make_tokenizer()("")


def _make_batch_shapes(model: ModelConfig, rows: int) -> PyTree:
    text_width = model.text_encoder.width if isinstance(model.text_encoder, FrozenTextConfig) else 0
    fields = _list_fields(model)
    row = make_empty_row(model.row_shape, width=model.backbone.token_width, text_width=text_width, fields=fields)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype), row)


def _list_fields(model: ModelConfig) -> list[Field]:
    """Return the fields of the training's rows."""
    frames, patch = model.frame_conditioning, model.backbone.patch
    fields = [each.field.to_rows(patch) for each in model.backbone.conditioning]
    if frames is not None and frames.has_mask_mix:
        autoencoder = model.autoencoder
        pair = make_mask_fields(channels=autoencoder.channels, temporal_stride=autoencoder.stride.t)
        fields += [field.to_rows(patch) for field in pair]
    elif frames is not None and frames.rest == "grey":
        fields.append(Field(name=COND_LATENTS, alignment="grid", shape=(model.backbone.token_width,)))
    return fields + _list_image_fields(model)


def _list_image_fields(model: ModelConfig) -> list[Field]:
    if model.image_encoder is None:
        return []
    encoder = read_clip_vision_config(model.image_encoder)
    return [Field(name=IMAGE_TOKENS, alignment="sequence", shape=(encoder.width,), length=encoder.tokens)]


def shard_shapes(state: PyTree, mesh: AnyMesh) -> PyTree:
    """Return the shapes of a state, sharded as in a run."""
    return attach_shardings(state, make_shardings(state, mesh))


def _count_costs(
    model: ModelConfig,
    rows: int,
    clips: Sequence[int],
    platform: Platform,
    *,
    training: bool,
    images: int = 0,
    copies: int = 1,
) -> StepSpec:
    """Return the counted costs of a denoiser's step, with texts as long as fit and `images` image tokens a clip."""
    text = min(model.text_encoder.max_tokens, model.row_shape.text // max(1, len(clips)))
    if isinstance(model.text_encoder, ByteEncoderConfig):
        text = -(-text // model.text_encoder.patch)
    return count_step_costs(
        model.backbone,
        model.row_shape,
        platform,
        rows=rows * copies,
        clips=[Grid(1, 1, clip) for clip in clips],
        texts=[text] * len(clips),
        images=[images] * len(clips),
        training=training,
    )


def _plan_sampler(
    experiment: Experiment, partitioner: MeshPartitioner, clips: Sequence[int], platform: Platform
) -> PlannedStep:
    model, rows, sampling = experiment.get_model(), experiment.denoiser.batch, experiment.sampling
    mesh = partitioner.mesh
    guidance = sampling.guidance
    empty_caption = _make_empty_caption(model.text_encoder)
    # The shapes of a batch do not depend on the clips in it: the smallest one is enough.
    smallest = np.zeros((*model.backbone.size_multiple, model.backbone.channels), np.float32)
    requests = [SamplingRequest("", "", smallest)] * rows
    fields = [field for each in model.backbone.conditioning for field in list_fields(each)]
    if channels := model.backbone.cond_channels:
        fields.append(Field(name=COND_LATENTS, alignment="grid", shape=(channels,)))
    fields += _list_image_fields(model)
    batched = sampling.branch_evaluation == "together"
    multiples = compute_row_multiples(mesh, guidance, is_batched=batched)
    count = multiples.round_up(rows, is_side_by_side=False)
    texts = {"": empty_caption}
    packer = Packer(requests, texts, model.backbone.patch, 1.0, guidance.dropped, count, tuple(fields))
    members = [[index] for index in range(rows)]
    row_shape = model.row_shape.pad_tokens(mesh.shape["context"])
    batch = packer.make_batch(PackedRequests(row_shape, False, members), members)
    backbone, text = get_graph_def(model.backbone.make, partitioner), get_graph_def(model.text_encoder.make)
    kinds = model.process, model.prediction, sampling.solver
    program = make_program(backbone, text, *kinds, None, batched, mesh)

    own_times = np.asarray(sampling.time_schedule(model.process, sampling.steps).times)
    strength = guidance.get_params(own_times, branch_count=guidance.branch_count)

    def start(tokens: Array) -> Any:
        state = init_state(sampling, model.process.scale_initial_noise(tokens), steps=sampling.steps)
        return start_model(state, model.backbone, batch, strength, is_batched=batched)

    room = compute_program_steps(sampling.steps)
    times: Any = jax.ShapeDtypeStruct((room + 1,), jnp.float32)
    arguments = ProgramArguments(
        jax.eval_shape(functools.partial(init_denoiser, model), jax.random.key(0)),
        jax.eval_shape(start, batch.branches[0].tokens),
        jax.eval_shape(lambda: batch),
        jax.eval_shape(lambda: strength),
        SampleTimes(times, times),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    arguments = attach_shardings(arguments, make_argument_shardings(arguments, mesh))
    passes = 1 if batched else guidance.branch_count
    costs = _count_costs(model, rows, clips, platform, training=False, copies=guidance.branch_count // passes)
    layers = _count_layer_bytes(model, functools.partial(init_denoiser, model))
    flops = sampling.steps * passes * costs.forward_flops
    lengths = {"sampling_steps": sampling.steps, "max_steps": room, "branch_passes": passes}
    return PlannedStep(program, arguments, flops, **lengths, costs=costs, layer_bytes=layers)


def _plan_autoencoder(experiment: Experiment, mesh: AnyMesh) -> PlannedStep:
    config, model = experiment.autoencoder, experiment.get_model().autoencoder
    if config is None:
        raise UserError("the autoencoder of this experiment is pretrained; plan its denoiser or its sampler")
    train_step, constants = make_autoencoder_step(config, model, experiment.seed, mesh=mesh)
    if isinstance(config.windows, FittedWindows):
        window = config.windows.get_largest(limit_windows(config, experiment.limits))
    else:
        window = max(config.windows, key=lambda window: window.batch * window.size.volume)
    if window.batch % (shards := count_row_shards(mesh)):
        raise UserError(
            f"windows in batches of {window.batch} do not divide among {shards} devices along data and fsdp; set "
            f"autoencoder windows of batch={window.batch + -window.batch % shards}, or use fewer chips"
        )
    batch = jax.ShapeDtypeStruct((window.batch, *window.size, 3), jnp.uint8)
    init = functools.partial(init_params, model.make)
    step, arguments = make_step_program(train_step, init, batch, mesh, constants=constants)
    unsharded = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    flops = jax.jit(train_step.update).lower(*unsharded).cost_analysis() or {}
    return PlannedStep(step, arguments, model_flops=int(flops.get("flops", 0)))
