"""From a folder to a pipeline."""

from pathlib import Path

from dit_video.errors import MissingError, UserError
from dit_video.pipeline import CONFIG, Pipeline, load_pipeline


def load(path: str | Path, *, text_encoder: str | Path | None = None) -> Pipeline:
    """The pipeline of a run folder or a pipeline folder.

    Of a run that is not finished it takes the newest checkpoint's averaged weights.

    Args:
      path: of the folder.
      text_encoder: where the model's frozen text encoder lies, if that has moved.

    Raises:
      MissingError: no such folder.
      UserError: a folder that holds no pipeline, or one of another version; a text encoder that is not frozen.
    """
    path = Path(path)
    if not path.is_dir():
        raise MissingError(f"no such run: {path}")
    for folder in (path, path / "pipeline"):
        if (folder / CONFIG).is_file():
            return load_pipeline(folder, text_encoder=text_encoder)
    if (path / "experiment.json").is_file():
        # Imported here: a finished pipeline is sampled without anything that training needs.
        from dit_video.run import Run

        pipeline = Run.open(path).newest_pipeline()
        return pipeline if text_encoder is None else pipeline.with_text_encoder(text_encoder)
    raise UserError(f"{path} holds neither {CONFIG} nor experiment.json; name a folder that train.py made")
