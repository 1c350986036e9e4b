"""Encode a data set of clips with a trained autoencoder, in any number of processes.

    python tools/encode_latents.py RUN_OR_PIPELINE DATA DESTINATION
    python tools/encode_latents.py RUN RUN/data RUN/latents --shard $SLURM_PROCID --shards $SLURM_NTASKS

DATA is what tools/ingest.py made, or RUN/data. DESTINATION becomes a TFDS data set in ArrayRecord files with the index
`latents.json`. Both may be addresses that fsspec opens (`gs://…`). Of a run, sizes and views are those of its config,
its held-out clips are left out, and its training looks for latents in `RUN/latents` or where `train.py --latents` says.
Each process encodes on all of its devices and makes every n-th file; a file that is there is not made again, so that a
process that was killed is started again with the same command. The process that finishes last writes the index;
`--finish` writes it, too.

With a frozen text encoder, that of the run's or pipeline's config or `--text-encoder FOLDER`, the embeddings of all
captions are stored beside the latents; for a denoiser that animates an image also what it is given of first frames.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import tyro

from dit_video.core.errors import UserError, script
from dit_video.core.storage import place
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource, Storage
from dit_video.data.latents.offline import (
    Augmentations,
    Encoding,
    encode_latents,
    finish_latents,
    latent_identity,
    plan_encoding,
)
from dit_video.data.sizes import SizeLimits
from dit_video.encoders.image import ImageEncoder
from dit_video.encoders.text import FrozenEncoder
from dit_video.experiment import Data
from dit_video.experiment.datasets import lies, taken
from dit_video.experiment.folder import CONFIG
from dit_video.experiment.run import Run
from dit_video.nn import param_shapes
from dit_video.pipelines.pipeline import load_pipeline
from dit_video.text import FrozenTextConfig
from dit_video.tokens import Grid
from dit_video.training.hooks.logging import Progress
from dit_video.weights import load as load_weights
from dit_video.weights import load_embedder

Model = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_PIPELINE")]
Clips = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
Destination = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]


@dataclass(frozen=True, kw_only=True)
class Views:
    """Which views of the clips are encoded; what isn't given is as the run or the pipeline has it."""

    max_pixels: int | None = None
    """of a frame; a larger clip is resized, keeping its aspect ratio"""
    max_frames: int | None = None
    """1 + k * temporal stride"""
    fps: float | None = None
    """clips of a higher rate are resampled to this one"""
    stretches: int | None = None
    """up to so many stretches of max-frames of a longer clip"""
    resolutions: tuple[int, ...] | None = None
    """further, smaller limits on the pixels of a frame"""
    flips: bool | None = None
    """each view mirrored too"""

    def over(self, data: Data) -> Data:
        """The same data with what is given in its place."""
        return replace(data, **{name: value for name, value in vars(self).items() if value is not None})


@script
def main(
    model: Model,
    data: Clips,
    destination: Destination,
    views: Annotated[Views, tyro.conf.arg(name="")] = Views(),
    shard: int | None = None,
    shards: int | None = None,
    finish: bool = False,
    storage: Storage = "bfloat16",
    views_per_file: int = 512,
    canvas_pixels: int | None = None,
    text_encoder: Path | None = None,
    max_text_tokens: int | None = None,
) -> None:
    """Encode a data set of clips with a trained autoencoder.

    Args:
        model: the folder of a run or a pipeline
        data: an ingested data set: a folder or gs://…
        destination: the latents: a folder or gs://…
        views: which views of the clips
        shard: this process's number; by default JAX's
        shards: how many processes there are; by default JAX's
        finish: only write the index, all files being there
        storage: how values are stored
        views_per_file: what a process that is killed loses at most
        canvas_pixels: what a device works on at once, in pixels over all frames
        text_encoder: the folder of a T5, UMT5 or CLIP, in place of the config's own encoder
        max_text_tokens: a longer caption is cut; as in the config, or the encoder's most, or 512
    """
    if (shard is None) != (shards is None):
        raise UserError(f"shard={shard} and shards={shards} are given together, or neither")
    number = jax.process_index() if shard is None else shard
    count = jax.process_count() if shards is None else shards
    target = lies(place(destination))
    encoding, clips = (_of_run if (model / CONFIG).is_file() else _of_pipeline)(model, data, views)
    encoding = _with_text(encoding, text_encoder, max_text_tokens)
    stamp = latent_identity(encoding, clips)
    encoding = replace(encoding, storage=storage, views_per_file=views_per_file)
    if canvas_pixels is not None:
        encoding = replace(encoding, canvas_pixels=canvas_pixels)
    plan = plan_encoding(clips, encoding)
    print(
        f"{len(clips)} clips, {len(plan.views)} views, {len(plan.files)} files; {plan.programs} programs, "
        f"{plan.padding:.1%} of their pixels are padding"
    )
    if finish:
        finished = finish_latents(target, encoding, plan, identity=stamp)
        if not finished:
            raise UserError(f"{target} has not all of its {len(plan.files)} files; encode the missing ones first")
    else:
        share = sum(plan.count(file) for file in range(number, len(plan.files), count))
        with Progress("encoding latents", share, unit="clip") as progress:
            finished = encode_latents(
                target, clips, encoding, plan, identity=stamp, shard=number, shards=count, progress=progress.update
            )
    if finished:
        _say(LatentSource(target, identity=stamp))
    else:
        print(f"{target}: the files of process {number} are there; the last of {count} processes writes the index")


def _of_run(folder: Path, data: str, views: Views) -> tuple[Encoding, ClipSource]:
    run = Run.open(folder)
    if not (folder / "autoencoder" / "weights.safetensors").is_file():
        raise UserError(f"{folder} has no trained autoencoder yet; continue it with: {run.command}")
    run = replace(run, experiment=replace(run.experiment, data=views.over(run.experiment.data)))
    if str(lies(place(data))) == str(lies(folder / "data")):
        clips = run.training_clips
    else:
        clips = taken(data)
        clips = clips.without({info.name for info in clips.infos} & set(run.experiment.data.held_out))
    return run.encoding(), clips.split("train")


def _of_pipeline(folder: Path, data: str, views: Views) -> tuple[Encoding, ClipSource]:
    config = load_pipeline(folder).config
    chosen = views.over(Data(max_pixels=config.size.h * config.size.w, max_frames=config.size.t, fps=config.fps))
    stride, patch = config.autoencoder.stride, config.dit.patch
    text = FrozenEncoder(config.text) if isinstance(config.text, FrozenTextConfig) else None
    images = None if config.image_encoder is None else ImageEncoder(config.image_encoder)
    encoding = Encoding(
        autoencoder=config.autoencoder,
        params=load_weights(folder / "autoencoder.safetensors", like=param_shapes(config.autoencoder.make)),
        limits=SizeLimits(
            max_pixels=chosen.max_pixels,
            max_frames=chosen.max_frames,
            multiple=Grid(stride.t, stride.h * patch.h, stride.w * patch.w),
            fps=chosen.fps,
        ),
        augmentations=Augmentations(stretches=chosen.stretches, resolutions=chosen.resolutions, flips=chosen.flips),
        encode_text=text,
        text_identity="" if text is None else text.identity,
        encode_image=images,
        image_identity="" if images is None else images.identity,
        shown=config.dit.given_channels == stride.t + config.autoencoder.channels,
    )
    return encoding, taken(data)


def _with_text(encoding: Encoding, folder: Path | None, max_tokens: int | None) -> Encoding:
    """With the text encoder that was asked for."""
    if folder is None:
        if max_tokens is not None:
            raise UserError(f"--max-text-tokens {max_tokens} goes with --text-encoder; give both, or neither")
        return encoding
    own = encoding.encode_text.config if isinstance(encoding.encode_text, FrozenEncoder) else None
    embedder = load_embedder(
        folder,
        max_tokens=max_tokens or (None if own is None else own.max_tokens),
        dtype="float32" if own is None else own.dtype,
    )
    return replace(encoding, encode_text=embedder, text_identity=embedder.identity)


def _say(latents: LatentSource) -> None:
    print(f"{latents.folder}: {len(latents)} examples of {len(set(latents.groups))} clips")
    for name, reason in latents.left_out[:10]:
        print(f"left out: {name}: {reason}")
    if len(latents.left_out) > 10:
        print(f"… {len(latents.left_out)} were left out: see left_out in {latents.folder}/latents.json")


if __name__ == "__main__":
    tyro.cli(main)
