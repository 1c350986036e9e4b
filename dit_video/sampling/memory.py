"""Memory of a pipeline's weights, stage by stage, before any of them is read."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dit_video.core.errors import MissingError, UserError
from dit_video.core.memory import format_bytes
from dit_video.core.offload import Layers, Offload, Stages, is_stacked_kernel, streams_layers
from dit_video.core.platform.devices import MemoryLimits, get_default_platform, get_memory_limits
from dit_video.core.trees import flatten, map_with_path
from dit_video.distributed import Parallelism, make_mesh, make_shardings
from dit_video.distributed.mesh import AnyMesh
from dit_video.models.encoders import FrozenTextConfig
from dit_video.nn import get_param_shapes
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.weights import read_clip_vision_config, read_text_encoder_config
from dit_video.weights.io import get_encoder_dtype

AUTOENCODER, IMAGE_ENCODER, TEXT = "autoencoder", "image encoder", "text"
_WHOLE_STAGES = (AUTOENCODER, IMAGE_ENCODER)
"""Stages whose layers do not move one at a time."""
_TEXT_SHARE, _DENOISER_SHARE = 0.95, 0.8
"""Shares of a device's memory that the weights of the text encoder and of a denoiser may take by default. The other
values of a text encoder are small."""


def make_weight_shapes(config: PipelineConfig, dtype_fn: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Return the shapes of the weights of each stage of generation, a tree of `jax.ShapeDtypeStruct` each.

    The stages are `text`, `image encoder`, the denoiser's experts (`backbone`, `low_noise`) and `autoencoder`, without
    those that a model lacks. Only the JSON files of folders are read. An encoder without a folder counts nothing: it is
    opened at the first prompt or image, perhaps in another place.

    Args:
      config: Config of the pipeline.
      dtype_fn: Returns the dtype of a parameter of the denoiser, given its path; float32 by default.

    Raises:
      UserError: If an encoder is not supported.
    """

    def cast(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, np.float32 if dtype_fn is None else dtype_fn(path))

    denoiser = map_with_path(cast, config.denoiser_shapes)
    shapes = {TEXT: denoiser.pop(TEXT)}
    if isinstance(config.model.text_encoder, FrozenTextConfig):
        shapes[TEXT] = _make_encoder_shapes(
            read_text_encoder_config, config.model.text_encoder.folder, config.model.text_encoder.dtype
        )
    if config.model.image_encoder is not None:
        shapes[IMAGE_ENCODER] = _make_encoder_shapes(read_clip_vision_config, config.model.image_encoder, "float32")
    return shapes | denoiser | {AUTOENCODER: get_param_shapes(config.model.autoencoder.make)}


def _make_encoder_shapes(read_config: Callable[[str], Any], folder: str, dtype: str) -> Any:
    try:
        config = read_config(folder)
    except MissingError:
        return {}
    return map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, get_encoder_dtype(path, dtype=dtype)),
        get_param_shapes(config.make),
    )


class StageBytes(NamedTuple):
    """Bytes of a stage's weights on one device."""

    total: int
    streamed: int = 0
    """Bytes of those whose layers can move one at a time."""
    layer: int = 0
    """Bytes of a layer of these."""


def is_streamed(name: str, stage: StageBytes, offload: Offload | None) -> bool:
    """Return True if the layers of a stage move to the device one at a time."""
    return stage.streamed > 0 and streams_layers(offload, "text" if name == TEXT else "denoiser")


def count_stage_bytes(shapes: dict[str, Any], mesh: AnyMesh | None = None) -> dict[str, StageBytes]:
    """Return the bytes of each stage of `make_weight_shapes` on one device; on a mesh the denoiser is sharded."""
    return {name: _count_stage(name, tree, mesh) for name, tree in shapes.items()}


def _count_stage(name: str, tree: Any, mesh: AnyMesh | None) -> StageBytes:
    is_encoder = name in (*_WHOLE_STAGES, TEXT)
    shardings = {} if mesh is None or is_encoder else flatten(make_shardings(tree, mesh))
    total = streamed = layer = 0
    for path, leaf in flatten(tree).items():
        shape = shardings[path].shard_shape(leaf.shape) if shardings else leaf.shape
        size = int(np.prod(shape)) * leaf.dtype.itemsize
        total += size
        if name not in _WHOLE_STAGES and is_stacked_kernel(path, leaf):
            streamed, layer = streamed + size, layer + size // leaf.shape[0]
    return StageBytes(total, streamed, layer)


def choose_offload(
    offload: Offload | Literal["auto"] | None,
    stages: dict[str, StageBytes],
    *,
    is_large: bool,
    platform: str,
    device_memory: int | None,
) -> Offload | None:
    """Return where weights are kept: as stated, or for `auto` as the device's memory allows.

    `auto` keeps the weights on the devices, unless the model is large and there is one GPU or TPU. Then it is
    `Stages()`, or `Layers()` of the parts whose weights take more of the device's memory than a share of it: 95 % for
    the text encoder, 80 % for a denoiser.

    Args:
      offload: The user's choice.
      stages: Bytes of the weights.
      is_large: Whether stages of the model are likely not to fit beside each other on one device.
      platform: Platform of the device, such as `gpu`.
      device_memory: Bytes of the device's memory; None if unknown.
    """
    if offload != "auto":
        return offload
    if not is_large or platform == "cpu":
        return None
    if device_memory is None:
        return Stages()
    is_text_large = stages[TEXT].total > _TEXT_SHARE * device_memory
    denoisers = (each.total for name, each in stages.items() if name not in (*_WHOLE_STAGES, TEXT))
    is_denoiser_large = max(denoisers) > _DENOISER_SHARE * device_memory
    is_any = is_text_large or is_denoiser_large
    return Layers(text=is_text_large, denoiser=is_denoiser_large) if is_any else Stages()


def fit_offload(
    offload: Offload | Literal["auto"] | None,
    config: PipelineConfig,
    dtype_fn: Callable[[str], Any] | None = None,
    *,
    parallel: Parallelism | None = None,
    is_large: bool,
) -> Offload | None:
    """Return where a pipeline's weights are kept, after checking that they fit there, before any is read.

    Args:
      offload: The user's choice; see `choose_offload`.
      config: Config of the pipeline.
      dtype_fn: Returns the dtype of a parameter of the denoiser; see `make_weight_shapes`.
      parallel: Devices that sample together; None for one.
      is_large: See `choose_offload`.

    Raises:
      UserError: If the weights do not fit into the memory of the device or the machine.
    """
    limits = get_memory_limits()
    mesh = None if parallel is None else make_mesh(parallel)
    stages = count_stage_bytes(make_weight_shapes(config, dtype_fn), mesh)
    platform = get_default_platform().name
    chosen = choose_offload(offload, stages, is_large=is_large, platform=platform, device_memory=limits.device)
    check_weight_memory(stages, chosen, limits, is_sharded=parallel is not None)
    return chosen


def check_weight_memory(
    stages: dict[str, StageBytes], offload: Offload | None, limits: MemoryLimits, *, is_sharded: bool = False
) -> None:
    """Check that weights alone fit into the memory of a device, and those in host memory into the machine's.

    Args:
      stages: Bytes of the weights.
      offload: Where they are kept.
      limits: Bytes of memory, each None if unknown; that of the device is None on a CPU.
      is_sharded: True on a mesh, where a machine may hold only a part of the weights.

    Raises:
      UserError: If the weights do not fit; the message says what would.
    """
    needed = _count_device_bytes(stages, offload)
    if limits.device is not None and needed > limits.device:
        others = (each for each in (Stages(), Layers()) if each != offload)
        fitting = next((each for each in others if _count_device_bytes(stages, each) <= limits.device), None)
        fix = "a mesh of several devices, or bfloat16 instead of float32" if fitting is None else f"offload={fitting}"
        rule = f"the weights then take {format_bytes(needed)} on a device, which has {format_bytes(limits.device)}"
        raise UserError(f"offload={offload} is invalid: {rule}. Use {fix}")
    total = sum(each.total for each in stages.values())
    is_on_host = offload is not None or limits.device is None
    if limits.host is not None and is_on_host and not is_sharded and total > limits.host:
        parts = ", ".join(f"{name} {format_bytes(each.total)}" for name, each in stages.items() if each.total)
        rule = f"its weights take {format_bytes(total)} ({parts}), this machine has {format_bytes(limits.host)}"
        raise UserError(
            f"the model is too large: {rule}. Use a smaller model, a larger machine, or bfloat16 instead of float32"
        )


def _count_device_bytes(stages: dict[str, StageBytes], offload: Offload | None) -> int:
    """Return the bytes of weights on a device in the stage with most of them."""
    if offload is None:
        return sum(each.total for each in stages.values())
    return max(
        each.total - each.streamed + each.layer if is_streamed(name, each, offload) else each.total
        for name, each in stages.items()
    )
