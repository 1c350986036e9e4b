"""Results of a training: its pipeline, and adapters and weights under other projects' names.

With several processes all of them call the functions that write: the first one writes what they gather.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dit_video.core.files import atomic_path
from dit_video.core.offload import Offload
from dit_video.data.clips import ClipInfo
from dit_video.data.sizes import SizeLimits, fit_size
from dit_video.distributed import Parallelism
from dit_video.distributed.gather import gather_parts, is_first_process, to_host
from dit_video.experiment.denoiser import add_other_expert
from dit_video.experiment.training_config import DenoiserTraining
from dit_video.families import find_format, get_lora_modules
from dit_video.families.family import DENOISER_FOLDERS
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.model_config import ModelConfig
from dit_video.sampling.devices import make_placement
from dit_video.sampling.loading import add_preview_decoder
from dit_video.sampling.memory import fit_offload
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.weights import get_native_modules, save_lora

ADAPTER_FILE, LORA_FILE = "adapter.safetensors", "pytorch_lora_weights.safetensors"


def save_adapter(
    folder: Path, backbone: BackboneConfig, adapter: dict[str, Any], params: dict[str, Any], *, expert: str = "backbone"
) -> None:
    """Write an adapter under our own names, and under its family's, as diffusers reads it: `load_lora_weights(folder)`.

    Args:
      folder: Folder of the run.
      backbone: The denoiser's config.
      adapter: The adapter, with the parts of `params` that it changes.
      params: The adapted parameters `{"backbone": ..., "text": ...}`, or their shapes.
      expert: Name of the model in a pipeline: `backbone` or, for the second of two experts, `low_noise`.
    """
    adapter = to_host(adapter)
    if not is_first_process():
        return
    named, base = ({expert if name == "backbone" else name: each[name] for name in each} for each in (adapter, params))
    save_lora(folder / ADAPTER_FILE, named, get_native_modules(base))
    if (modules := get_lora_modules(backbone)) and "backbone" in adapter:
        save_lora(folder / LORA_FILE, adapter["backbone"], modules)


def save_transformer(
    folder: Path, backbone: BackboneConfig, params: dict[str, Any], *, expert: str = "backbone"
) -> None:
    """Write a complete denoiser as its family's class in diffusers reads it; nothing if there is none."""
    denoiser_format = find_format(backbone)
    if denoiser_format is None or not denoiser_format.can_express(backbone):
        return
    target, is_writer = folder / DENOISER_FOLDERS[expert], is_first_process()
    with atomic_path(target) if is_writer else contextlib.nullcontext(target) as temporary:
        denoiser_format.save(temporary, backbone, gather_parts(params["backbone"]), is_writer=is_writer)


def make_pipeline(
    config: PipelineConfig,
    training: DenoiserTraining,
    *,
    autoencoder: dict[str, Any],
    denoiser: dict[str, Any],
    preview_folder: Path,
    parallel: Parallelism | None = None,
    offload: Offload | Literal["auto"] | None = "auto",
    folder: Path = Path(),
) -> Pipeline:
    """Return the pipeline of a training, on several devices or on the default one.

    Args:
      config: Its config.
      training: The training of its denoiser.
      autoencoder: Parameters of its autoencoder.
      denoiser: Parameters that the training has made.
      preview_folder: Folder that may hold the preview decoder of its autoencoder.
      parallel: Devices that sample together; None for the default one.
      offload: Weights in host memory; see `dit_video.load`.
      folder: Folder of the run.
    """
    offload = fit_offload(offload, config, parallel=parallel, is_large=parallel is None and config.boundary is not None)
    place = make_placement(parallel, offload)
    pipeline = Pipeline(
        config,
        autoencoder=autoencoder,
        denoiser=add_other_expert(training, config.model, denoiser, place),
        get_lora_modules=get_lora_modules,
        parallel=parallel,
        offload=offload,
        folder=folder,
    )
    return add_preview_decoder(pipeline, preview_folder)


def make_pipeline_config(
    model: ModelConfig,
    training: DenoiserTraining,
    infos: Sequence[ClipInfo],
    *,
    limits: SizeLimits,
    **options: Any,
) -> PipelineConfig:
    """Return the config of the pipeline of a training.

    Args:
      model: The model, with its frame rate.
      training: The training of its denoiser.
      infos: The training clips.
      limits: Limits on their sizes; the largest is the default size of samples.
      options: Further fields of the config.
    """
    sizes = [fit_size(info, limits) for info in infos]
    return PipelineConfig(
        model=model,
        caption_dropout=training.caption_dropout,
        boundary=None if training.expert is None else training.expert.boundary,
        batch=training.batch,
        size=max(sizes, key=lambda size: (size.volume, size)),
        **options,
    )
