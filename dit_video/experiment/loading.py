"""Loading of a pipeline from a folder, or from a name on the Hugging Face hub."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dit_video.core.errors import MissingError, UserError
from dit_video.distributed import MeshConfig
from dit_video.distributed.mesh import resolve_mesh
from dit_video.families.denoisers import get_lora_modules
from dit_video.families.family import INDEX, Dtype
from dit_video.families.registry import find_family, list_families
from dit_video.nn import Backend
from dit_video.pipelines.devices import make_placement
from dit_video.pipelines.folder import CONFIG, RUN_CONFIG, is_pipeline_folder
from dit_video.pipelines.loading import load_pipeline
from dit_video.pipelines.pipeline import Pipeline
from dit_video.weights.parameter import Placement

_HUB_ENDINGS = ("json", "safetensors", "model")
"""Endings of the files that are downloaded from the hub."""


def load(
    path: str | Path,
    *,
    text_encoder: str | Path | None = None,
    dtype: Dtype | None = None,
    place: Placement | None = None,
    mesh: MeshConfig | Mesh | None = None,
    attention: Backend | None = None,
    ema: float | int | None = None,
    sigma_rel: float | None = None,
) -> Pipeline:
    """Load the pipeline of a run folder, a pipeline folder, or a folder of open weights (Wan, DiT and SiT).

    Of an unfinished run, the newest checkpoint's averaged weights are loaded; its clips are not needed, and nothing is
    trained.

    Args:
      path: a folder; or the name of one on the Hugging Face hub, such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`, which is
        downloaded once into the cache of `huggingface_hub`.
      text_encoder: folder of the model's frozen text encoder, if it has moved.
      dtype: open weights only: dtype of the matrix products, float32 by default; see `WanFamily.load_pipeline` and
        `DitFamily.load_pipeline`.
      place: open weights only: places each parameter, for example on sharded devices; see there.
      mesh: devices that sample together: a `MeshConfig`, or a mesh with its axes; None for one device. The denoiser's
        weights are sharded as in training, and clips, branches of guidance, tokens and heads are divided among the
        devices. In a run of several processes all of them load and sample.
      attention: backend of attention, by name or as its settings, instead of the model's own; `auto` takes the best one
        for the devices.
      ema: runs only: decay of another average that the run keeps, at the newest checkpoint; 0 for the weights without
        an average.
      sigma_rel: runs only: relative width of an average that is reconstructed from the run's snapshots.

    Raises:
      MissingError: the folder does not exist here or on the hub, or lacks parts.
      UserError: a folder without a pipeline, of another version or of an unknown class; a text encoder that is not
        frozen; a hub that cannot be reached; a mesh that does not fit the devices or the denoiser; attention
        that the denoiser does not support or whose kernels the devices lack.
    """
    folder = Path(path)
    # A name on the hub has two parts, of which the first is not a folder here.
    if not folder.parent.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        folder = _download(str(path))
    if not folder.is_dir():
        raise MissingError(f"no such run: {folder}")
    if mesh is not None and place is not None:
        raise UserError("place is invalid beside mesh, which places the weights. Use one of them.")
    if (family := find_family(folder)) is not None:
        if mesh is not None:
            place = make_placement(resolve_mesh(mesh)[0])
        options: dict[str, Any] = {"dtype": dtype or "float32", "place": place, "mesh": mesh}
        pipeline = family.load_pipeline(folder, text_encoder=text_encoder, **options)
        return pipeline if attention is None else pipeline.with_attention(attention)
    if dtype is not None or place is not None:
        raise UserError(f"dtype and place are for open weights; {folder} has no {INDEX}, leave them out")
    has_average, is_run = ema is not None or sigma_rel is not None, (folder / RUN_CONFIG).is_file()
    if has_average and not is_run:
        raise UserError(f"{folder} is not a run and has one set of weights; leave out ema and sigma_rel")
    inner = next(filter(is_pipeline_folder, (folder, folder / "pipeline")), None)
    if inner is not None and not has_average:
        return load_pipeline(
            inner, text_encoder=text_encoder, get_lora_modules=get_lora_modules, mesh=mesh, attention=attention
        )
    if not is_run:
        raise UserError(f"{folder} holds neither {CONFIG} nor {RUN_CONFIG} nor {INDEX}; name a run or open weights")
    # Imported here: sampling a finished pipeline needs nothing of what training imports.
    from dit_video.experiment.run import Run

    run = Run.open(folder)
    if attention is not None:
        run = replace(run, experiment=run.experiment.replace_backbone(attention=attention))
    pipeline = run.newest_pipeline(ema=ema, sigma_rel=sigma_rel, mesh=mesh)
    return pipeline if text_encoder is None else pipeline.with_text_encoder(text_encoder)


def _download(name: str) -> Path:
    """Return the local copy of a folder on the hub, downloading it if needed.

    Raises:
      MissingError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download  # Imported here: local folders need no hub.

    parts = {part for family in list_families() for part in family.parts}
    files = [INDEX, *sorted(f"{part}/*.{ending}" for part in parts for ending in _HUB_ENDINGS)]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of several libraries: no network, no such name, no permission, no room
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingError(
            f"no such folder: {name}; nor could it be downloaded from the Hugging Face hub ({reason[:200]}): check the "
            f"name and the network, or download it elsewhere (hf download {name}) and name the folder"
        ) from error
