"""The config in the folder of a pipeline, and in that of a run, which has other weights."""

from pathlib import Path

from dit_video.core import config_json
from dit_video.core.errors import UserError
from dit_video.core.files import read_document, write_json
from dit_video.sampling.pipeline_config import PipelineConfig

FORMAT = 1
CONFIG, RUN_CONFIG = "pipeline.json", "experiment.json"
WHOLE_FOLDERS = ("pipeline", "transformer", "transformer_2")
"""Folders of results that a run writes at once."""
AUTOENCODER, DENOISER, STEPS = "autoencoder.safetensors", "denoiser.safetensors", "steps"
"""Files of weights, and the folder of the pipelines of previous steps."""
PREVIEW = "preview.safetensors"
"""File of the preview decoder, which a pipeline may lack."""


def is_pipeline_folder(folder: str | Path) -> bool:
    """Return whether a folder holds the files of a pipeline. A run has the config, too, but other weights."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / RUN_CONFIG).is_file()


def write_pipeline_config(folder: str | Path, config: PipelineConfig) -> None:
    """Write the config of a pipeline or of a run, whose weights `load` finds by it."""
    write_json(Path(folder) / CONFIG, {"format": FORMAT, "config": config_json.to_json(config)})


def read_pipeline_config(folder: str | Path) -> PipelineConfig:
    """Read the config in the folder of a pipeline or of a run.

    Raises:
      MissingError: the folder holds none.
      UserError: a config of another version, or of something else.
    """
    path = Path(folder) / CONFIG
    document = read_document(path, format=FORMAT, kind="pipeline", fix="export it again")
    config = config_json.from_json(document.get("config"))
    if not isinstance(config, PipelineConfig):
        raise UserError(f"{path} holds no pipeline's config; export it again")
    return config
