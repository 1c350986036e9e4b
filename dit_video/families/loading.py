"""From a folder, or a name on the Hugging Face hub, to a pipeline."""

import re
from pathlib import Path

from dit_video.core.errors import MissingError, UserError
from dit_video.families.dit.pipeline import holds_classes, load_class_pipeline
from dit_video.families.wan.pipeline import INDEX, PARTS, Dtype, Place, load_wan
from dit_video.pipelines.pipeline import CONFIG, Pipeline, load_pipeline

_FILES = (INDEX, *(f"{part}/*.{ending}" for part in PARTS for ending in ("json", "safetensors", "model")))
"""What is fetched of a hub's folder."""


def load(
    path: str | Path,
    *,
    text_encoder: str | Path | None = None,
    dtype: Dtype | None = None,
    place: Place | None = None,
    ema: float | int | None = None,
    sigma_rel: float | None = None,
) -> Pipeline:
    """The pipeline of a run folder, a pipeline folder, or a folder of open weights (Wan, DiT and SiT).

    Of a run that is not finished it takes the newest checkpoint's averaged weights.

    Args:
      path: of the folder; or the name of one on the Hugging Face hub, such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`, which
        is fetched once and kept where `huggingface_hub` keeps such folders.
      text_encoder: where the model's frozen text encoder lies, if that has moved.
      dtype: of open weights alone: that of the matrix products, float32 by default; see `wan_pipeline.load_wan` and
        `class_pipeline.load_class_pipeline`.
      place: of open weights alone: reads each parameter to where it is kept, such as its place on devices; see there.
      ema: of a run alone: another of the averages that it keeps, by its decay, as of the newest checkpoint; 0 for the
        weights without an average.
      sigma_rel: of a run alone: the relative width of an average that is put together from the run's snapshots.

    Raises:
      MissingError: no such folder, here or on the hub, or parts that it lacks.
      UserError: a folder that holds no pipeline, one of another version, or one of a class that isn't known here; a
        text encoder that is not frozen; a hub that can't be reached.
    """
    folder = Path(path)
    if not folder.exists() and _is_name(path):
        folder = _fetched(str(path))
    if not folder.is_dir():
        raise MissingError(f"no such run: {folder}")
    if holds_classes(folder):
        if text_encoder is not None:
            raise UserError(f"{folder} holds a model of classes, which has no text encoder; leave text_encoder away")
        return load_class_pipeline(folder, dtype=dtype or "float32", place=place)
    if (folder / INDEX).is_file():
        return load_wan(folder, text_encoder=text_encoder, dtype=dtype or "float32", place=place)
    if dtype is not None or place is not None:
        raise UserError(f"dtype and place are for open weights; {folder} has no {INDEX}, leave them away")
    if ema is not None or sigma_rel is not None:
        return _with_text_encoder(_run_pipeline(folder, ema, sigma_rel), text_encoder)
    for inner in (folder, folder / "pipeline"):
        if (inner / CONFIG).is_file():
            return load_pipeline(inner, text_encoder=text_encoder)
    if (folder / "experiment.json").is_file():
        return _with_text_encoder(_run_pipeline(folder, None, None), text_encoder)
    raise UserError(
        f"{folder} holds neither {CONFIG} nor experiment.json nor {INDEX}; name a folder that train.py made, or one of "
        "open weights in diffusers' layout"
    )


def _run_pipeline(folder: Path, ema: float | int | None, sigma_rel: float | None) -> Pipeline:
    if not (folder / "experiment.json").is_file():
        raise UserError(f"{folder} is no run, and has one set of weights; leave out ema and sigma_rel")
    # Imported here: a finished pipeline is sampled without anything that training needs.
    from dit_video.experiment.run import Run

    return Run.open(folder).newest_pipeline(ema=ema, sigma_rel=sigma_rel)


def _with_text_encoder(pipeline: Pipeline, text_encoder: str | Path | None) -> Pipeline:
    return pipeline if text_encoder is None else pipeline.with_text_encoder(text_encoder)


def _is_name(path: str | Path) -> bool:
    """Whether a path that leads nowhere may be a name on the hub: two parts, the first of which is no folder here."""
    name = str(path)
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).parent.exists()


def _fetched(name: str) -> Path:
    """The local copy of a hub's folder, fetched if it isn't there yet.

    Raises:
      MissingError: it can't be fetched.
    """
    try:
        # Imported here: folders that lie here need no hub.
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingError(
            f"no such folder: {name}; to fetch it from the Hugging Face hub, pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # of several libraries: no network, no such name, no permission, no room
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingError(
            f"no such folder: {name}; nor could it be fetched from the Hugging Face hub ({reason[:200]}): check the "
            f"name and the network, or fetch it elsewhere (hf download {name}) and name the folder"
        ) from error
