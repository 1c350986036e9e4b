"""Plans of pipelines: the memory of each stage of generation on one device, from the programs that it runs.

No weights are read or allocated: programs are compiled for shapes, of TPUs that need not be present.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dit_video.core.errors import UserError
from dit_video.core.memory import count_bytes, format_bytes
from dit_video.core.offload import DEVICE, HOST, Layers, Offload, Stages, is_stacked_kernel
from dit_video.core.trees import map_with_path
from dit_video.data.latents.codec import LatentCodec, compute_default_memory, fit_chunk
from dit_video.families import find_family
from dit_video.families.family import LoadOptions
from dit_video.models.autoencoders.streaming import make_chunk_program
from dit_video.models.encoders import FrozenTextConfig, Tokenizer
from dit_video.models.encoders.embedder import make_embedding_program
from dit_video.models.features.clip import make_frame_program
from dit_video.nn.partitioner import ONE_DEVICE
from dit_video.planning.compiled_program import compile_step, count_local_bytes, override_default_backend
from dit_video.planning.hardware import Topology
from dit_video.planning.plan import check_memory, find_devices
from dit_video.sampling.memory import (
    AUTOENCODER,
    IMAGE_ENCODER,
    TEXT,
    choose_offload,
    count_stage_bytes,
    is_streamed,
    make_weight_shapes,
)
from dit_video.sampling.pipeline_config import PipelineConfig, make_denoiser, read_pipeline_config, to_grid
from dit_video.sampling.preparation import make_empty_model_parts, prepare_request
from dit_video.sampling.request import Request
from dit_video.sampling.sampler import list_programs
from dit_video.tokens import Grid
from dit_video.weights import read_clip_vision_config, read_text_encoder_config
from dit_video.weights.frozen_encoders import FEATURE

_OFFLOADS: tuple[Offload | None, ...] = (None, Stages(), Layers(denoiser=False), Layers(text=False), Layers())
"""From the fastest to the one that needs least memory."""
_DEFAULTS = LoadOptions()
_QUICK = {"exec_time_optimization_effort": -1.0}
"""Options of XLA for TPUs that compile convolutions of large frames in a twelfth of the time, by a shorter search for
the sizes of their blocks."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Memory of a stage of generation on the device, in bytes."""

    name: str
    weights: int
    """Weights of the stage on the device."""
    host_weights: int
    """Weights of the stage that stay in host memory, and move a layer at a time."""
    other_weights: int
    """Weights of the other stages on the device."""
    activations: int
    """Everything else, at the peak."""
    overflow: str | None = None
    """The compiler's reason, where the stage does not fit."""

    @property
    def peak(self) -> int:
        """Return the memory that the stage needs."""
        return self.weights + self.other_weights + self.activations


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """Memory of a pipeline's stages on one device."""

    folder: str
    topology: Topology
    size: Grid
    """Frames, height and width of the clip."""
    offload: Offload | None
    limit: int
    """Bytes of memory that the plan is for."""
    stages: tuple[StagePlan, ...]

    @property
    def peak(self) -> int:
        """Return the largest memory of a stage."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Return True if every stage fits on the device."""
        return self.peak <= self.limit and not any(stage.overflow for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        stages = [dataclasses.asdict(stage) | {"peak": stage.peak} for stage in self.stages]
        own = {"folder": self.folder, "topology": str(self.topology), "size": list(self.size), "limit": self.limit}
        return own | {"offload": repr(self.offload), "peak": self.peak, "fits": self.fits, "stages": stages}

    def __str__(self) -> str:
        frames, height, width = self.size
        verdict = "fits" if self.fits else "does not fit"
        lines = [
            f"{self.folder}: a clip of {frames} frames of {height}x{width}, offload={self.offload}, on one device of "
            f"{self.topology}",
            f"{verdict}: {format_bytes(self.peak)} of {format_bytes(self.limit)}",
            f"{'stage':12} {'weights':>12} {'others':>12} {'activations':>12} {'peak':>12} {'in host':>12}",
        ]
        for each in self.stages:
            values = (each.weights, each.other_weights, each.activations, each.peak, each.host_weights)
            lines.append(f"{each.name:12} " + " ".join(f"{format_bytes(value):>12}" for value in values))
            lines += [f"  {each.overflow}"] if each.overflow else []
        return "\n".join(lines)


def plan_pipeline(
    folder: str | Path,
    topology: Topology,
    *,
    size: Grid | tuple[int, int, int] | None = None,
    options: LoadOptions = _DEFAULTS,
    memory: int | None = None,
) -> PipelinePlan:
    """Compile the programs of a pipeline's stages for one device, and return the memory that each needs.

    For TPUs the programs are compiled in a twentieth of the time of those that run, with XLA's least effort for their
    speed. Those that run need as much memory or less.

    Args:
      folder: Folder of open weights or of a pipeline of one's own; only its JSON files are read.
      topology: The hardware; one device is used.
      size: Frames, height and width of the clip; the pipeline's own by default.
      options: Dtypes, text encoder and offload, as for `dit_video.load` on a GPU or TPU; no mesh.
      memory: Bytes that the device may use; all of its memory by default.

    Raises:
      MissingError: If the folder does not exist or lacks parts.
      UserError: If programs cannot be compiled for the device here, the size or the memory is not supported, or the
        family cannot be planned.
    """
    return next(_list_plans(folder, topology, [options.offload], size=size, options=options, memory=memory))


def fit_pipeline(
    folder: str | Path,
    topology: Topology,
    memory: int | None = None,
    *,
    size: Grid | tuple[int, int, int] | None = None,
    options: LoadOptions = _DEFAULTS,
) -> PipelinePlan:
    """Return the plan with the fastest `offload` that fits into a memory.

    If none fits, the plan with `Layers()` says what is missing. Arguments and errors are those of `plan_pipeline`; the
    `offload` of the options is not used.
    """
    plans = _list_plans(folder, topology, _OFFLOADS, size=size, options=options, memory=memory)
    plan = next(plans)
    while not plan.fits and (following := next(plans, None)):
        plan = following
    return plan


def _list_plans(
    folder: str | Path,
    topology: Topology,
    offloads: Sequence[Offload | Literal["auto"] | None],
    *,
    size: Grid | tuple[int, int, int] | None,
    options: LoadOptions,
    memory: int | None,
) -> Iterator[PipelinePlan]:
    """Yield a plan with each `offload`; programs that several have in common are compiled once."""
    folder = Path(folder)
    devices, can_compile = find_devices(topology)
    if not can_compile:
        raise UserError(
            f"{topology} is invalid: pipelines are planned by compiling. Use a TPU, or run this on {topology}"
        )
    mesh = Mesh(np.asarray(devices[:1]), ("device",))
    available = topology.chip.usable_memory * topology.num_chips // len(devices)
    limit = check_memory(memory, available, topology)
    family = find_family(folder)
    config = read_pipeline_config(folder) if family is None else family.make_config(folder, options)
    shapes = make_weight_shapes(config, None if family is None else family.make_dtype_fn(options))
    size = config.size if size is None else to_grid(size)
    with override_default_backend(devices[0].platform):
        programs = list(_list_programs(config, size, shapes, memory=compute_default_memory(limit)))
    weights = count_stage_bytes(shapes)
    total = sum(each.total for each in weights.values())

    @functools.cache
    def compile_program(number: int, streams_layers: bool) -> StagePlan:
        return _compile(programs[number], mesh, streams_layers=streams_layers, reserved=available - limit)

    for choice in offloads:
        offload = choose_offload(choice, weights, is_large=True, platform=devices[0].platform, device_memory=limit)
        stages = []
        for number, each in enumerate(programs):
            own = weights[each.part]
            plan = compile_program(number, is_streamed(each.part, own, offload))
            stages.append(dataclasses.replace(plan, other_weights=total - own.total if offload is None else 0))
        fields: dict[str, Any] = {"folder": str(folder), "topology": topology, "size": size, "offload": offload}
        yield PipelinePlan(**fields, limit=limit, stages=tuple(stages))


class _Program(NamedTuple):
    """A program of a stage, with the shapes of its arguments."""

    name: str
    part: str
    """Name of the weights."""
    run: Callable[..., Any]
    params: Any
    arguments: tuple[Any, ...]
    """Arguments besides the parameters."""


def _list_programs(config: PipelineConfig, size: Grid, shapes: dict[str, Any], *, memory: int) -> Iterator[_Program]:
    """Yield the programs of a request in their order, of one with a first image if the model takes one.

    Args:
      config: Config of the pipeline.
      size: Frames, height and width of the clip.
      shapes: Shapes of the weights of each stage.
      memory: Bytes that coding may take, besides the autoencoder.
    """
    if isinstance(config.model.text_encoder, FrozenTextConfig):
        yield _make_text_program(config.model.text_encoder, shapes[TEXT])
    image_fields = _list_image_fields(config)
    if config.model.image_encoder is not None:
        yield _make_image_program(config.model.image_encoder, shapes[IMAGE_ENCODER], len(image_fields))
    latents = config.model.latent_grid(size)
    model = make_empty_model_parts(config)
    codec = LatentCodec(config.model.autoencoder, shapes[AUTOENCODER])
    if config.model.backbone.cond_channels or config.model.backbone.conditioning:
        yield _make_coding_program(codec, "encode", latents, memory)
    elif config.model.frame_conditioning is not None:
        yield _make_coding_program(codec, "encode", latents._replace(t=1), memory)
    params = {name: shapes[name] for name in config.denoiser_shapes if name != TEXT}
    params[TEXT] = {} if isinstance(config.model.text_encoder, FrozenTextConfig) else shapes[TEXT]
    denoiser = make_denoiser(config, params, _make_tokenizer(config), partitioner=ONE_DEVICE)
    images: dict[str, Any] = dict.fromkeys(image_fields, np.zeros((*size[1:], 3), np.uint8))
    request = prepare_request(config, Request("", size, **images), model)
    programs = list_programs(denoiser, [request], sampling=config.sampling, shape=config.model.row_shape, rows=1)
    for expert, program, (own, *rest) in programs:
        yield _Program("sampling" if expert == "backbone" else "second expert", expert, program, own, tuple(rest))
    yield _make_coding_program(codec, "decode", latents, memory)


def _make_text_program(config: FrozenTextConfig, params: Any) -> _Program:
    encoder = dataclasses.replace(read_text_encoder_config(config.folder), dtype=config.dtype)
    tokens = jax.ShapeDtypeStruct((1, config.max_tokens), jnp.int32)
    return _Program("text", TEXT, make_embedding_program(encoder), params, (tokens, tokens))


def _make_image_program(folder: str, params: Any, count: int) -> _Program:
    encoder = read_clip_vision_config(folder)
    images = jax.ShapeDtypeStruct((count, encoder.size, encoder.size, 3), jnp.float32)
    return _Program("image", IMAGE_ENCODER, make_frame_program(encoder, FEATURE), params, (images,))


def _make_coding_program(codec: LatentCodec, method: str, latents: Grid, memory: int) -> _Program:
    _, frames = fit_chunk(codec.config, method, 1, latents, memory)
    run, (params, *rest) = make_chunk_program(codec.config, method, 1, latents._replace(t=frames))
    return _Program(f"{method[:-1]}ing", AUTOENCODER, run, params, tuple(rest))


def _list_image_fields(config: PipelineConfig) -> tuple[str, ...]:
    """Return the fields of a request with the images that the model takes, or needs."""
    if config.model.frame_conditioning is None:
        return ()
    return ("image",) if config.model.backbone.image_positions is None else ("image", "last_image")


def _make_tokenizer(config: PipelineConfig) -> Tokenizer:
    """Return a tokenizer whose texts are as long as they can be, if its encoder is frozen."""
    if not isinstance(config.model.text_encoder, FrozenTextConfig):
        return config.model.text_encoder.make_tokenizer()
    shape = config.model.text_encoder.max_tokens, config.model.text_encoder.width
    return lambda _caption: np.zeros(shape, np.float32)


def _compile(program: _Program, mesh: Mesh, *, streams_layers: bool, reserved: int) -> StagePlan:
    """Compile a program, and return its memory; weights of other stages are not counted.

    Args:
      program: The program.
      mesh: Mesh of the one device.
      streams_layers: Leaves the kernels of stacked layers in host memory.
      reserved: Bytes of the device's memory that the program must leave to others.
    """

    def place(kind: str, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        )

    params = map_with_path(
        lambda path, leaf: place(HOST if streams_layers and is_stacked_kernel(path, leaf) else DEVICE, leaf),
        program.params,
    )
    rest = jax.tree.map(functools.partial(place, DEVICE), program.arguments)
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    compiler_options = {**_QUICK, "xla_tpu_user_reserved_hbm_bytes": reserved} if is_tpu else {}
    compiled = compile_step(program.run, (params, *rest), mesh, compiler_options=compiler_options)
    weights = sum(map(count_local_bytes, jax.tree.leaves(params)))
    return StagePlan(
        name=program.name,
        weights=weights,
        host_weights=count_bytes(params) - weights,
        other_weights=0,
        activations=max(0, compiled.memory.peak - weights),
        overflow=compiled.oom_message,
    )
