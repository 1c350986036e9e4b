"""Loading of a pipeline folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dit_video.core.offload import Offload
from dit_video.distributed import Parallelism
from dit_video.nn import Backend, get_param_shapes
from dit_video.sampling.devices import make_placement
from dit_video.sampling.memory import fit_offload
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import (
    AUTOENCODER,
    DENOISER,
    PREVIEW,
    STEPS,
    PipelineConfig,
    read_pipeline_config,
)
from dit_video.sampling.preview import load_preview_decoder
from dit_video.weights import load as load_weights
from dit_video.weights.io import read_params_file
from dit_video.weights.lora import GetLoraModules, no_lora_modules
from dit_video.weights.parameter import Placement


def load_pipeline(
    folder: str | Path,
    *,
    text_encoder: str | Path | None = None,
    get_lora_modules: GetLoraModules = no_lora_modules,
    parallel: Parallelism | None = None,
    attention: Backend | None = None,
    offload: Offload | Literal["auto"] | None = "auto",
    run_folder: Path | None = None,
) -> Pipeline:
    """Read a pipeline folder, one parameter after the other to its devices.

    Args:
      folder: Folder of the pipeline.
      text_encoder: Folder of its frozen text encoder if it has moved; it is opened at the first prompt.
      get_lora_modules: See `Pipeline`.
      parallel: Devices that sample together; None for the default one.
      attention: Backend of attention instead of the model's own.
      offload: Weights in host memory; see `dit_video.load`.
      run_folder: Folder of the run that it is of, which files of conditioning are relative to; None for its own.

    Raises:
      MissingError: If the folder does not exist, or holds no pipeline.
      UserError: If the pipeline is of another version, its weights do not fit its config or the memory, the text
        encoder is not frozen, `parallel` does not fit the devices or the denoiser, or the denoiser does not support the
        attention or the devices lack its kernels.
    """
    folder = Path(folder)
    config = read_pipeline_config(folder)
    if attention is not None:
        config = replace(config, model=config.model.replace_backbone(attention=attention))
    is_large = parallel is None and config.boundary is not None
    resolved = fit_offload(offload, config, parallel=parallel, is_large=is_large)
    place = make_placement(parallel, resolved)
    pipeline = Pipeline(
        config,
        autoencoder=load_weights(folder / AUTOENCODER, like=get_param_shapes(config.model.autoencoder.make)),
        denoiser=read_denoiser(folder, config, place),
        previous={
            step.name: load_pipeline(
                folder / STEPS / step.name, parallel=parallel, attention=attention, offload=offload
            )
            for step in config.previous
        },
        get_lora_modules=get_lora_modules,
        parallel=parallel,
        offload=resolved,
        folder=run_folder or folder,
    )
    pipeline = add_preview_decoder(pipeline, folder)
    return pipeline if text_encoder is None else pipeline.with_text_encoder(text_encoder)


def add_preview_decoder(pipeline: Pipeline, folder: Path) -> Pipeline:
    """Return the pipeline with the preview decoder of its folder, if it has one."""
    path = folder / PREVIEW
    return pipeline.with_preview_decoder(load_preview_decoder(path)) if path.is_file() else pipeline


def read_denoiser(folder: Path, config: PipelineConfig, place: Placement) -> dict[str, Any]:
    """Read the parameters of a pipeline folder's denoiser to their destination, one after the other.

    Raises:
      MissingError: If the folder holds none.
      UserError: If the weights do not fit the config.
    """
    return read_params_file(folder / DENOISER, config.denoiser_shapes, place=place)
