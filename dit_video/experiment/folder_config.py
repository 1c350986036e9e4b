"""The config of the pipeline that a folder is loaded as, without its weights."""

from dataclasses import replace
from pathlib import Path

from dit_video.families.family import DEFAULT_DTYPE, Dtype, LoadOptions
from dit_video.families.registry import find_family
from dit_video.sampling.pipeline_config import CONFIG, PipelineConfig, read_pipeline_config
from dit_video.weights.text_encoder import set_encoder_folder


def read_config(
    folder: str | Path,
    *,
    text_encoder: str | Path | None = None,
    dtype: Dtype | None = None,
    text_dtype: Dtype | None = None,
) -> PipelineConfig | None:
    """Return the config of the pipeline that `dit_video.load` would load; its arguments have the same meaning here.

    It is None for a folder without a config: a run whose clips are not known yet, or a mistake, about which
    `dit_video.load` says more.

    Raises:
      MissingError: a folder of open weights that lacks parts.
      UserError: a folder of an unknown class or with unsupported settings, or a text encoder that is not frozen.
    """
    folder = Path(folder)
    if (family := find_family(folder)) is not None:
        options = LoadOptions(text_encoder=text_encoder, dtype=dtype or DEFAULT_DTYPE, text_dtype=text_dtype)
        return family.make_config(folder, options)
    inner = next((each for each in (folder, folder / "pipeline") if (each / CONFIG).is_file()), None)
    if inner is None:
        return None
    config = read_pipeline_config(inner)
    return config if text_encoder is None else replace(config, text=set_encoder_folder(config.text, text_encoder))
