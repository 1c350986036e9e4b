"""Input of the denoiser's training: rows of cached latents, or of clips that are encoded while they are read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int64

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.data.bucket_batches import load_bucket_batches
from dit_video.data.buckets import BucketConfig, Buckets, plan_buckets
from dit_video.data.captions import (
    CachedCaptions,
    CaptionSource,
    EmbeddedCaptions,
    TokenizedCaptions,
    get_distinct_captions,
)
from dit_video.data.clips import ClipSource
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.online import OnlineEncoder
from dit_video.data.loader import DenoiserBatches, LoaderConfig, load_encoded_batches, load_packed_batches
from dit_video.data.packing.balance import Balance, Cost
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.rows import Encode
from dit_video.data.sizes import compute_all_sampled_fps, fit_sizes
from dit_video.data.windows import DECODE_THREADS
from dit_video.distributed import RowPart, check_denoiser, count_row_shards
from dit_video.experiment.run import Run
from dit_video.experiment.training_config import DenoiserTraining
from dit_video.models.autoencoders import latent_grid
from dit_video.models.encoders import Tokenizer
from dit_video.tokens import Grid, compute_token_grid
from dit_video.training.hooks.logging import Progress
from dit_video.weights.frozen_encoders import FrozenTextEncoder

_BATCHES_PER_STEP = 4
"""Number of encoder batches per canvas size that a step's clips are divided into.  The number of clips varies from step
to step, so the last batch is half empty on average: an eighth of the work."""

BatchFactory = Callable[[int], DenoiserBatches]
"""Opens the batches from a step on."""


def make_cached_batches(
    run: Run, training: DenoiserTraining, latents: LatentSource, texts: CaptionSource
) -> BatchFactory:
    """Return the input of a training on cached latents of the training clips; `texts` are their captions."""
    model, clips = run.model, run.training_clips
    mixed, mask_mix = make_mixture(latents, clips, run.data.used_weights), make_mask_mix(run)
    intervals = _compute_token_dt(run, clips, latents.clips)

    def feed(start: int) -> DenoiserBatches:
        reading = _make_loader_config(run, training, start, mixed, threads=1)
        sizes: dict[str, Any] = {"patch": model.backbone.patch, "shape": model.row_shape, "token_dt": intervals}
        return load_packed_batches(latents, texts, config=reading, mask_mix=mask_mix, **sizes)

    return feed


def _compute_token_dt(
    run: Run, clips: ClipSource, names: Sequence[str] | None = None
) -> Float[np.ndarray, " n"] | None:
    """Return the seconds between tokens along time in the clips of these names, or in all; None if positions count."""
    if run.model.backbone.time_coordinate == "tokens":
        return None
    intervals = np.asarray(run.model.compute_token_dt(compute_all_sampled_fps(clips, run.limits)))
    return intervals if names is None else intervals[_find_numbers(clips, names)]


def _find_numbers(clips: ClipSource, names: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """Return the number of the clip of each name."""
    numbers = pc.index_in(pa.array(names, pa.string()), value_set=pa.array(clips.column("name"), pa.string()))
    return numbers.to_numpy().astype(np.int64)


def make_online_batches(
    run: Run, training: DenoiserTraining, clips: ClipSource, texts: CaptionSource, encode: Encode
) -> BatchFactory:
    """Return rows, or bucket batches where the config has buckets, of clips that are encoded from their video files.

    Args:
      run: The run, as the stage sees it.
      training: The training.
      clips: The clips.
      texts: Their captions.
      encode: `make_online_encoder` of the same run and clips.

    Raises:
      UserError: If not one example of some size fits into the memory of a bucket's batch.
    """
    model, weights = run.model, run.data.used_weights
    buckets = None if training.buckets is None else make_buckets(run, training.buckets, clips)
    mixed = Mixture(sizes=clips.dataset_sizes, weights=weights) if weights else None

    def feed(start: int) -> DenoiserBatches:
        reading = _make_loader_config(run, training, start, mixed, threads=DECODE_THREADS)
        common: dict[str, Any] = {
            "latent_grid": functools.partial(latent_grid, stride=model.autoencoder.stride),
            "channels": model.autoencoder.channels,
            "limits": run.limits,
            "patch": model.backbone.patch,
            "config": reading,
            "token_dt": _compute_token_dt(run, clips),
        }
        if buckets is None:
            mask_mix = make_mask_mix(run)
            return load_encoded_batches(clips, texts, encode, shape=model.row_shape, mask_mix=mask_mix, **common)
        text_length = min(model.row_shape.text, model.text_encoder.max_tokens)
        return load_bucket_batches(clips, texts, encode, buckets, max_text=text_length, **common)

    return feed


def make_mask_mix(run: Run) -> MaskMix | None:
    """Return the draws of masks of known pixels; None for a denoiser with a first frame alone, or without it."""
    frames, autoencoder = run.model.frame_conditioning, run.model.autoencoder
    if frames is None or not frames.has_mask_mix:
        return None
    return MaskMix(frames, run.seed, autoencoder.channels, autoencoder.stride)


def make_online_encoder(
    run: Run, training: DenoiserTraining, autoencoder_params: dict[str, Any], clips: ClipSource
) -> OnlineEncoder:
    """Return an encoder of clips as they are read, with the parameters of the autoencoder.

    Raises:
      UserError: If not one example of some size fits into the memory of a bucket's batch.
    """
    model, shape = run.model.autoencoder, run.model.row_shape
    hosts = RowPart.from_mesh(run.mesh).part_count
    if training.buckets is not None:
        buckets = make_buckets(run, training.buckets, clips).buckets
        sizes = [bucket.size for bucket in buckets for _ in range(bucket.batch // hosts)]
        return OnlineEncoder(model, autoencoder_params, sizes)
    distinct, _, kinds = find_distinct_grids(fit_sizes(clips, run.limits))
    grids = [compute_token_grid(latent_grid(size, model.stride), run.model.backbone.patch) for size in distinct]
    tokens, sizes = sum(grids[kind].volume for kind in kinds.tolist()), [distinct[kind] for kind in kinds.tolist()]
    steps = tokens / (shape.tokens * training.batch / hosts)
    return OnlineEncoder(model, autoencoder_params, sizes, calls=max(1, _BATCHES_PER_STEP * steps))


def check_inputs(run: Run, training: DenoiserTraining) -> None:
    """Check that the denoiser can be trained on the run's clips, before the autoencoder is trained for hours.

    Raises:
      UserError: If rows, tokens, heads or hidden widths are not divisible by the devices, if the data set has no clips
        to train on, or if not one example of some size fits into the memory.
    """
    model, mesh, clips = run.model, run.mesh, run.training_clips
    tokens = model.row_shape.tokens
    if training.buckets is not None:
        make_buckets(run, training.buckets, clips)
        if mesh.shape["context"] > 1:
            rule = "the tokens of a clip may not be divisible by it; leave out buckets, or use context=1"
            raise UserError(f"context={mesh.shape['context']} is invalid with buckets: {rule}")
        check_denoiser(run.partitioner, model.backbone, rows=count_row_shards(mesh), tokens=tokens)
        return
    if training.batch // training.accumulation_steps % (shards := count_row_shards(mesh)):
        part = "" if training.accumulation_steps == 1 else f", in {training.accumulation_steps} parts,"
        raise UserError(
            f"a batch of {training.batch} rows{part} does not divide among {shards} devices; use a multiple"
        )
    check_denoiser(run.partitioner, model.backbone, rows=training.batch // training.accumulation_steps, tokens=tokens)
    if run.data.used_weights:
        Mixture(sizes=clips.dataset_sizes, weights=run.data.used_weights)


def make_buckets(run: Run, config: BucketConfig, clips: ClipSource) -> Buckets:
    """Plan the buckets of these clips.

    Raises:
      UserError: If not one example of some size fits into the memory.
    """
    model = run.model

    def tokens(size: Grid) -> int:
        return compute_token_grid(latent_grid(size, model.autoencoder.stride), model.backbone.patch).volume

    return plan_buckets(
        fit_sizes(clips, run.limits),
        config.memory,
        budget=config.budget,
        count=config.count,
        devices=count_row_shards(run.mesh),
        max_batch=config.max_batch,
        count_tokens=tokens,
    )


def open_captions(
    tokenizer: Tokenizer | FrozenTextEncoder, clips: ClipSource, *, cached: LatentSource | None = None
) -> CaptionSource:
    """Return the captions of every example as rows hold them: token ids, or embeddings, `cached` ones where they exist.

    The examples are the clips, or those of the cached latents.

    Raises:
      UserError: If the latents were encoded without the captions, or if the embeddings have another width.
    """
    shares = clips.compute_caption_shares()
    captions = clips.column("captions") if cached is None else cached.all_captions
    if shares is not None and cached is not None:
        ends = np.cumsum([len(texts) or 1 for texts in clips.column("captions")])
        parts = np.split(shares, ends[:-1])
        shares = np.concatenate([parts[number] for number in _find_numbers(clips, cached.clips)])
    if not isinstance(tokenizer, FrozenTextEncoder):
        return TokenizedCaptions(captions, tokenizer, shares=shares)
    if cached is not None:
        texts = CachedCaptions(cached, shares=shares)
        if texts.width != tokenizer.config.width:
            raise UserError(
                f"{cached.folder} holds embeddings of width {texts.width}, the config says {tokenizer.config.width}; "
                f"set text_encoder width={texts.width} and backbone context_width={texts.width}"
            )
        return texts
    with Progress("embedding captions", len(get_distinct_captions(captions)), unit="caption") as progress:
        return EmbeddedCaptions(
            captions,
            tokenizer.encode_many,
            identity=tokenizer.identity,
            count_tokens=tokenizer.count_tokens,
            shares=shares,
            progress=progress.update,
        )


def make_mixture(latents: LatentSource, clips: ClipSource, weights: Sequence[float]) -> Mixture | None:
    """Return the mixture of an epoch: each clip once, as one of its views, or as often as its data set's weight says.

    Returns:
      None where an epoch has each example once.
    """
    if not weights and latents.groups.max() + 1 == len(latents):
        return None
    clips = clips.select(set(latents.clips))
    variants = _find_numbers(clips, latents.clips)
    return Mixture(sizes=clips.dataset_sizes, weights=tuple(weights) or None, variants=variants)


def _make_loader_config(
    run: Run, training: DenoiserTraining, start: int, mixture: Mixture | None, *, threads: int
) -> LoaderConfig:
    backbone, part = run.model.backbone, RowPart.from_mesh(run.mesh)
    return LoaderConfig(
        batch=training.batch,
        seed=run.seed,
        start_step=start,
        host=part.part_index,
        hosts=part.part_count,
        threads=threads,
        workers=run.data.workers,
        mixture=mixture,
        balance=Balance(cost=Cost.from_width(backbone.width, layer_params=backbone.layer_params), batch=training.batch),
        attention_pairs=backbone.attention_pairs,
        token_lead=run.model.token_lead,
    )
