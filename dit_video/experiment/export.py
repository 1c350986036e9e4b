"""Results of a run: the config of its pipeline, and adapters and weights under other projects' names.

With several processes all of them call the functions that write: the first one writes what they gather.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dit_video.core.files import atomic_path
from dit_video.core.offload import Offload
from dit_video.data.clips import ClipInfo
from dit_video.data.sizes import fit_size
from dit_video.distributed import MeshConfig
from dit_video.distributed.gather import gather_parts, is_first_process, to_host
from dit_video.experiment.autoencoder import WEIGHTS_FILE, read_autoencoder
from dit_video.experiment.config import Experiment
from dit_video.experiment.denoiser import add_other_expert
from dit_video.experiment.encoders import open_text_encoder
from dit_video.experiment.runtime import Runtime
from dit_video.experiment.training_config import AutoencoderTraining, PretrainedAutoencoder
from dit_video.families import find_format, get_lora_modules
from dit_video.families.family import DENOISER_FOLDERS
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.encoders import Tokenizer
from dit_video.sampling.devices import make_placement
from dit_video.sampling.loading import add_preview_decoder
from dit_video.sampling.memory import fit_offload
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import CONFIG as PIPELINE_CONFIG
from dit_video.sampling.pipeline_config import PipelineConfig, read_pipeline_config
from dit_video.weights import get_native_modules, save_lora
from dit_video.weights.frozen_encoders import FrozenTextEncoder

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
    experiment: Experiment,
    runtime: Runtime,
    denoiser: dict[str, Any],
    *,
    mesh: MeshConfig | Mesh | None = None,
    offload: Offload | Literal["auto"] | None = "auto",
) -> Pipeline:
    """Return the pipeline of a run with these weights of the denoiser, on the devices of a mesh or on the default one.

    `offload` is described at `dit_video.load`.

    Raises:
      MissingError: If the autoencoder is not trained yet.
    """
    autoencoder = read_autoencoder(experiment.autoencoder, runtime.folder, command=runtime.command)
    config = get_pipeline_config(experiment, runtime)
    offload = fit_offload(offload, config, mesh=mesh, is_large=mesh is None and config.boundary is not None)
    place = make_placement(mesh, offload)
    pipeline = Pipeline(
        config,
        autoencoder=autoencoder,
        denoiser=add_other_expert(experiment.denoiser, denoiser, place),
        get_lora_modules=get_lora_modules,
        mesh=mesh,
        offload=offload,
    )
    return add_preview_decoder(pipeline, _get_preview_folder(experiment.autoencoder, runtime.folder))


def _get_preview_folder(config: AutoencoderTraining | PretrainedAutoencoder, folder: Path) -> Path:
    """Return the folder that may hold the preview decoder of a run's autoencoder."""
    if isinstance(config, PretrainedAutoencoder):
        return Path(config.folder or folder)
    return (folder / WEIGHTS_FILE).parent


def get_pipeline_config(experiment: Experiment, runtime: Runtime) -> PipelineConfig:
    """Return the config of a run's pipeline, which was written when it began, or which follows from the clips."""
    if (runtime.folder / PIPELINE_CONFIG).is_file():
        # The experiment's own backbone may have another attention than when the run began.
        return replace(read_pipeline_config(runtime.folder), backbone=experiment.denoiser.backbone)
    text, infos = open_text_encoder(experiment, runtime), runtime.training_clips.infos
    config = make_pipeline_config(experiment, infos, text, command=runtime.command)
    return replace(config, provenance=config.provenance | {"data": " ".join(runtime.clips.versions)})


def make_pipeline_config(
    experiment: Experiment, infos: Sequence[ClipInfo], encoder: Tokenizer | FrozenTextEncoder, *, command: str
) -> PipelineConfig:
    """Return the config of a run's pipeline.

    Args:
      experiment: The run's experiment.
      infos: The training clips.
      encoder: Encoder of their captions.
      command: Command that started the run.
    """
    rates = [info.fps for info in infos if info.frames > 1] or [info.fps for info in infos]
    sizes = [fit_size(info, experiment.limits) for info in infos]
    denoiser = experiment.denoiser
    return PipelineConfig(
        autoencoder=experiment.autoencoder.model,
        backbone=denoiser.backbone,
        text=encoder.pinned_config if isinstance(encoder, FrozenTextEncoder) else denoiser.text,
        process=denoiser.objective.process,
        prediction=denoiser.objective.prediction,
        caption_dropout=denoiser.caption_dropout,
        boundary=None if denoiser.expert is None else denoiser.expert.boundary,
        layout=denoiser.row_shape,
        batch=denoiser.batch,
        sampling=experiment.sampling,
        fps=float(np.median(rates)) if experiment.data.fps is None else experiment.data.fps,
        frame_conditioning=denoiser.frame_conditioning,
        conditioner=denoiser.conditioner,
        image_encoder=denoiser.image_encoder,
        evaluation=experiment.evaluation,
        size=max(sizes, key=lambda size: (size.volume, size)),
        provenance={
            "command": command,
            "experiment": experiment.name,
            "seed": str(experiment.seed),
            "dit_video": version("dit-video"),
            "jax": jax.__version__,
        },
    )
