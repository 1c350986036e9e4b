"""Encode a data set of clips with a trained autoencoder, in any number of processes."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import tyro

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.storage import to_storage_path
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource, StorageDtype
from dit_video.data.latents.offline import encode_latents, finish_latents
from dit_video.data.latents.plan import Augmentations, Encoding, compute_latent_identity, plan_encoding
from dit_video.data.usable_clips import ClipRequirements, select_usable
from dit_video.experiment import DataConfig
from dit_video.experiment.datasets import open_datasets, resolve
from dit_video.experiment.latents import make_encoding
from dit_video.experiment.run import Run
from dit_video.models.encoders import FrozenTextConfig
from dit_video.models.model_config import ModelConfig
from dit_video.nn import get_param_shapes
from dit_video.sampling.pipeline_config import RUN_CONFIG as CONFIG
from dit_video.sampling.pipeline_config import read_pipeline_config
from dit_video.training.hooks.logging import Progress
from dit_video.weights import load as load_weights
from dit_video.weights import load_embedder
from dit_video.weights.frozen_encoders import FrozenImageEncoder, FrozenTextEncoder

Model = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_PIPELINE")]
Clips = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
Destination = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]


@dataclass(frozen=True, kw_only=True)
class Views:
    """Views of the clips to encode; unset fields are the run's or the pipeline's."""

    max_pixels: int | None = None
    """Maximum number of pixels of a frame; larger clips are resized, keeping their aspect ratio."""
    max_frames: int | None = None
    """Maximum number of frames of a view: 1 + k * temporal stride."""
    fps: float | None = None
    """Maximum frame rate; faster clips are resampled to it."""
    clips_per_video: Annotated[int | None, tyro.conf.arg(name="stretches")] = None
    """Maximum number of views of --max-frames frames that are taken from a longer video."""
    resolutions: tuple[int, ...] | None = None
    """Additional, smaller limits on the number of pixels of a frame; each adds a view."""
    flips: bool | None = None
    """Add a mirrored copy of each view."""
    background: str | None = None
    """Colour behind transparent pixels, as in `DataConfig`."""

    def override(self, data: DataConfig, model: ModelConfig) -> tuple[DataConfig, ModelConfig]:
        """Return `data` and `model` with the fields that are set replaced."""
        changes = {name: value for name, value in vars(self).items() if name != "fps" and value is not None}
        return replace(data, **changes), model if self.fps is None else replace(model, fps=self.fps)


def main(
    model: Model,
    data: Clips,
    destination: Destination,
    views: Annotated[Views, tyro.conf.arg(name="")] = Views(),
    shard: int | None = None,
    shards: int | None = None,
    finish: bool = False,
    storage: StorageDtype = "bfloat16",
    views_per_file: int = 512,
    canvas_pixels: int | None = None,
    text_encoder: Path | None = None,
    max_text_tokens: int | None = None,
) -> None:
    """Encode a data set of clips with a trained autoencoder, in any number of processes.

    For example:

        python tools/encode_latents.py RUN_OR_PIPELINE DATA DESTINATION
        python tools/encode_latents.py RUN RUN/data RUN/latents --shard $SLURM_PROCID --shards $SLURM_NTASKS

    DATA is a data set written by tools/ingest.py, or RUN/data. DESTINATION becomes a TFDS data set in ArrayRecord files
    with a table, `table.json`. Both may be addresses that fsspec can open (`gs://…`). For a run, sizes and views are
    those of its config and its held-out clips are skipped; its training reads latents from `RUN/latents` or from the
    folder in `train.py --latents`.

    Each of n processes encodes every n-th file on all of its devices. Files that exist are not encoded again, so run
    the same command to restart a killed process. The process that finishes last, or one with `--finish`, writes the
    index.

    With a frozen text encoder (the config's, or `--text-encoder FOLDER`), the embeddings of all captions are
    stored next to the latents; for an image-to-video denoiser, so is the conditioning on first frames.

    Args:
        model: Folder of a run or of a pipeline.
        data: Data set written by tools/ingest.py: a folder or an address (gs://…).
        destination: Folder or address (gs://…) to write the latents to.
        views: Views of the clips to encode.
        shard: Index of this process; JAX's by default.
        shards: Number of processes; JAX's by default.
        finish: Only write the index, once all files exist.
        storage: Data type in which latents are stored.
        views_per_file: Number of views in a file, which is also the most that a killed process loses.
        canvas_pixels: Maximum number of pixels, over all frames, that a device encodes at once.
        text_encoder: Folder of a T5, UMT5 or CLIP to use instead of the config's text encoder.
        max_text_tokens: Length to which captions are truncated; by default the config's, the encoder's maximum or 512.
    """
    check_minimum(0, shard=shard)
    check_minimum(
        1, shards=shards, views_per_file=views_per_file, canvas_pixels=canvas_pixels, max_text_tokens=max_text_tokens
    )
    if (shard is None) != (shards is None):
        raise UserError(
            f"--shard {shard} and --shards {shards} are invalid: they belong together. Use both, or neither."
        )
    number = jax.process_index() if shard is None else shard
    count = jax.process_count() if shards is None else shards
    target = resolve(to_storage_path(destination))
    encoding, clips = (_prepare_run if (model / CONFIG).is_file() else _prepare_pipeline)(model, data, views)
    encoding = _set_text_encoder(encoding, text_encoder, max_text_tokens)
    stamp = compute_latent_identity(encoding)
    encoding = replace(encoding, storage=storage, views_per_file=views_per_file)
    if canvas_pixels is not None:
        encoding = replace(encoding, canvas_pixels=canvas_pixels)
    plan = plan_encoding(clips, encoding, target)
    print(
        f"{len(clips)} clips, {len(plan.views)} views, {len(plan.files)} files; {plan.num_canvas_sizes} programs, "
        f"{plan.padding_share:.1%} of their pixels are padding"
    )
    if finish:
        finished = finish_latents(target, clips, encoding, plan, identity=stamp)
        if not finished:
            raise UserError(f"{target} lacks some of its {len(plan.files)} files; encode the missing ones first")
    else:
        share = sum(plan.count_views(file) for file in range(number, len(plan.files), count))
        with Progress("encoding latents", share, unit="clip") as progress:
            finished = encode_latents(
                target, clips, encoding, plan, identity=stamp, shard=number, shards=count, progress=progress.update
            )
    if finished:
        _print_summary(LatentSource(target, identity=stamp))
    else:
        print(f"{target}: process {number} has written its files; the last of {count} processes writes the index")


def _prepare_run(folder: Path, data: str, views: Views) -> tuple[Encoding, ClipSource]:
    run = Run.open(folder)
    own_data, model = views.override(run.data, run.model)
    run = replace(run, experiment=replace(run.experiment, data=own_data, model=model))
    if str(resolve(to_storage_path(data))) == str(resolve(folder / "data")):
        clips = run.training_clips
    else:
        clips = open_datasets(data, captions=run.data.captions, background=run.data.background)
        clips = clips.exclude({info.name for info in clips.infos} & set(run.experiment.data.held_out))
        clips = _select_usable(clips.select_split("train"), run.requirements, run.data)
    return make_encoding(run), clips


def _prepare_pipeline(folder: Path, data: str, views: Views) -> tuple[Encoding, ClipSource]:
    config = read_pipeline_config(folder)
    whole = DataConfig(max_pixels=config.size.h * config.size.w, max_frames=config.size.t)
    settings, model = views.override(whole, config.model)
    frames = model.frame_conditioning
    text = FrozenTextEncoder(model.text_encoder) if isinstance(model.text_encoder, FrozenTextConfig) else None
    images = None if model.image_encoder is None else FrozenImageEncoder(model.image_encoder)
    encoding = Encoding(
        autoencoder=model.autoencoder,
        params=load_weights(folder / "autoencoder.safetensors", like=get_param_shapes(model.autoencoder.make)),
        limits=settings.make_limits(model),
        augmentations=Augmentations(
            clips_per_video=settings.clips_per_video, resolutions=settings.resolutions, flips=settings.flips
        ),
        encode_text=text,
        text_identity="" if text is None else text.identity,
        encode_image=images,
        image_identity="" if images is None else images.identity,
        cond_latents=frames is not None and frames.rest == "grey",
    )
    requirements = ClipRequirements(limits=encoding.augmentations.list_limits(encoding.limits))
    return encoding, _select_usable(open_datasets(data, background=settings.background), requirements, settings)


def _select_usable(clips: ClipSource, requirements: ClipRequirements, data: DataConfig) -> ClipSource:
    """Return the clips that can be encoded, and print those that cannot."""
    selected = select_usable(clips, requirements)
    selected.check(data.max_excluded_share)
    if selected.excluded:
        print(selected.describe())
    return selected.clips


def _set_text_encoder(encoding: Encoding, folder: Path | None, max_tokens: int | None) -> Encoding:
    """Return `encoding` with the text encoder in `folder`, or unchanged if it is None."""
    if folder is None:
        if max_tokens is not None:
            raise UserError(f"--max-text-tokens {max_tokens} needs --text-encoder; use both, or neither")
        return encoding
    own = encoding.encode_text.config if isinstance(encoding.encode_text, FrozenTextEncoder) else None
    embedder = load_embedder(
        folder,
        max_tokens=max_tokens or (None if own is None else own.max_tokens),
        dtype="float32" if own is None else own.dtype,
    )
    return replace(encoding, encode_text=embedder, text_identity=embedder.identity)


def _print_summary(latents: LatentSource) -> None:
    print(f"{latents.folder}: {len(latents)} examples of {latents.groups.max() + 1} clips")
    for name, reason, *_ in latents.skipped[:10]:
        print(f"skipped: {name}: {reason}")
    if len(latents.skipped) > 10:
        print(f"… {len(latents.skipped)} were skipped: see the rows of {latents.folder}/index that are unreadable")


if __name__ == "__main__":
    script(parse_arguments)(main)
