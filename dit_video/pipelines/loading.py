"""Loading of a pipeline folder."""

from pathlib import Path

from dit_video.nn import get_param_shapes
from dit_video.pipelines.folder import AUTOENCODER, DENOISER, STEPS, read_pipeline_config
from dit_video.pipelines.pipeline import Pipeline
from dit_video.weights import load as load_weights
from dit_video.weights.lora import GetLoraModules, no_lora_modules


def load_pipeline(
    folder: str | Path,
    *,
    text_encoder: str | Path | None = None,
    get_lora_modules: GetLoraModules = no_lora_modules,
) -> Pipeline:
    """Read a pipeline folder.

    Args:
      folder: folder of the pipeline.
      text_encoder: folder of its frozen text encoder if it has moved; it is opened at the first prompt.
      get_lora_modules: see `Pipeline`.

    Raises:
      MissingError: the folder does not exist, or holds no pipeline.
      UserError: a pipeline of another version, weights that do not fit its config, or a text encoder that is not
        frozen.
    """
    folder = Path(folder)
    config = read_pipeline_config(folder)
    pipeline = Pipeline(
        config,
        autoencoder=load_weights(folder / AUTOENCODER, like=get_param_shapes(config.autoencoder.make)),
        denoiser=load_weights(folder / DENOISER, like=config.denoiser_shapes),
        previous={step.name: load_pipeline(folder / STEPS / step.name) for step in config.previous},
        get_lora_modules=get_lora_modules,
    )
    return pipeline if text_encoder is None else pipeline.with_text_encoder(text_encoder)
