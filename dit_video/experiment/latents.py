"""Cached latents of a run's training clips, with embeddings of their captions where the text encoder is frozen."""

import time
from pathlib import Path

import jax

from dit_video.data.latents import offline
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.plan import (
    ENCODE_AGAIN,
    Augmentations,
    Encoding,
    check_clips,
    compute_latent_identity,
    plan_encoding,
)
from dit_video.data.tables import MANIFEST
from dit_video.experiment import datasets
from dit_video.experiment.run import KEEP_DATA, Run
from dit_video.training import goodput
from dit_video.training.hooks.logging import Progress, print_on_first_process
from dit_video.weights.frozen_encoders import IDENTITY_FILE, FrozenTextEncoder, open_image_encoder


def make_encoding(run: Run) -> Encoding:
    """Return the encoding of the clips, with the parameters of the autoencoder and the frozen encoders.

    Raises:
      MissingError: If the autoencoder is not trained yet.
    """
    model, data, images = run.model, run.data, None
    if model.image_encoder is not None:
        images = open_image_encoder(model.image_encoder, identity_file=run.folder / IDENTITY_FILE)
    params, text, frames = run.read_autoencoder(), run.open_text_encoder(), model.frame_conditioning
    frozen = text if isinstance(text, FrozenTextEncoder) else None
    return Encoding(
        autoencoder=model.autoencoder,
        params=params,
        limits=run.limits,
        augmentations=Augmentations(
            clips_per_video=data.clips_per_video, resolutions=data.resolutions, flips=data.flips
        ),
        encode_text=frozen,
        text_identity="" if frozen is None else frozen.identity,
        encode_image=images,
        image_identity="" if images is None else images.identity,
        cond_latents=frames is not None and frames.rest == "grey" and not frames.has_mask_mix,
        masks=frames.masks if frames is not None and frames.has_mask_mix else (),
        conditioning=model.backbone.conditioning,
        open_conditioning=lambda: run.open_conditioning(params),
    )


def link_latents(run: Run, folder: Path) -> None:
    """Let the latents of a run at an address lie there, if they have no other place."""
    if run.remote is not None and not folder.exists():
        datasets.link_folder(folder, run.remote.address / folder.relative_to(run.remote.local), "latents")


def are_encoded(folder: Path) -> bool:
    """Return whether a folder, or what it stands for, has all latents."""
    return (datasets.resolve(folder) / MANIFEST).exists()


def check_latents(run: Run, folder: Path) -> None:
    """Check that the latents in a folder, if they are finished, are of the run's clips and captions.

    Raises:
      UserError: If they are not.
    """
    if are_encoded(folder):
        _check_clips(run, LatentSource(datasets.resolve(folder)))


def _check_clips(run: Run, source: LatentSource) -> None:
    columns = sorted({name for each in run.model.backbone.conditioning for name in each.columns})
    # To encode again would lead to the next refusal.
    check_clips(source, run.training_clips, columns, fix=KEEP_DATA if run.has_begun("denoiser") else ENCODE_AGAIN)


def encode_latents(run: Run, folder: Path) -> None:
    """Encode the training clips into a folder, or what it stands for, all processes together; none that is finished."""
    if are_encoded(folder):
        return
    destination = datasets.resolve(folder)
    with run.recorder.phase(f"{goodput.STAGE}latents"):
        encoding, clips = make_encoding(run), run.training_clips
        identity, plan = compute_latent_identity(encoding), plan_encoding(clips, encoding, destination)
        with Progress("encoding latents", len(plan.views), unit="clip") as progress:
            finished = offline.encode_latents(
                destination,
                clips,
                encoding,
                plan,
                identity=identity,
                shard=run.process,
                shards=jax.process_count(),
                progress=progress.update,
            )
        while not finished:  # other processes are still writing their files
            time.sleep(1)
            finished = offline.finish_latents(destination, clips, encoding, plan, identity=identity)


def open_latents(run: Run, folder: Path, *, encoding: Encoding | None = None) -> LatentSource:
    """Return the cached latents in a folder, or what it stands for.

    Args:
      run: The run.
      folder: The folder.
      encoding: The encoding of the clips, if it is made already; it reads the autoencoder's weights.

    Raises:
      MissingError: If the latents are not encoded yet.
      UserError: If the latents are of other clips or of another autoencoder.
    """
    encoding = make_encoding(run) if encoding is None else encoding
    source = LatentSource(datasets.resolve(folder), identity=compute_latent_identity(encoding))
    _check_clips(run, source)
    if source.skipped:
        name, reason, *_ = source.skipped[0]
        count = len(source.skipped)
        print_on_first_process(f"{count} clips could not be encoded and are skipped, such as {name}: {reason}")
    return source
