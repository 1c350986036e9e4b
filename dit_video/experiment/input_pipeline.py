"""Input of the denoiser's training: rows of cached latents, or of clips that are encoded while they are read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import Mesh
from jaxtyping import Float, Int64

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.data.bucket_batches import load_bucket_batches
from dit_video.data.buckets import Buckets, plan_buckets
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
from dit_video.data.latents.plan import Augmentations, Encoding
from dit_video.data.loader import DenoiserBatches, LoaderConfig, load_encoded_batches, load_packed_batches
from dit_video.data.packing.balance import Balance, Cost
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.data.packing.mixture import Mixture
from dit_video.data.packing.rows import Encode
from dit_video.data.sizes import compute_all_sampled_fps, fit_sizes
from dit_video.data.windows import DECODE_THREADS
from dit_video.distributed import MeshPartitioner, RowPart, check_denoiser, count_row_shards
from dit_video.distributed.mesh import AnyMesh
from dit_video.experiment.config import Experiment
from dit_video.models.autoencoders import latent_grid
from dit_video.models.encoders import Tokenizer
from dit_video.tokens import Grid, compute_token_grid
from dit_video.training.hooks.logging import Progress
from dit_video.weights.frozen_encoders import FrozenImageEncoder, FrozenTextEncoder

_BATCHES_PER_STEP = 4
"""Number of encoder batches per canvas size that a step's clips are divided into.  The number of clips varies from step
to step, so the last batch is half empty on average: an eighth of the work."""

BatchFactory = Callable[[int], DenoiserBatches]
"""Opens the batches from a step on."""


def make_cached_batches(
    experiment: Experiment, mesh: Mesh, latents: LatentSource, clips: ClipSource, texts: CaptionSource
) -> BatchFactory:
    """Return the input of a training on cached latents of these clips; `texts` are the captions of the latents."""
    config = experiment.denoiser
    mixed, mask_mix = make_mixture(latents, clips, experiment.data.used_weights), make_mask_mix(experiment)
    intervals = _compute_token_dt(experiment, clips, latents.clips)

    def feed(start: int) -> DenoiserBatches:
        reading = _make_loader_config(experiment, mesh, start, mixed, threads=1)
        sizes: dict[str, Any] = {"patch": config.backbone.patch, "shape": config.row_shape, "token_dt": intervals}
        return load_packed_batches(latents, texts, config=reading, mask_mix=mask_mix, **sizes)

    return feed


def _compute_token_dt(
    experiment: Experiment, clips: ClipSource, names: Sequence[str] | None = None
) -> Float[np.ndarray, " n"] | None:
    """Return the seconds between tokens along time in the clips of these names, or in all; None if positions count."""
    backbone = experiment.denoiser.backbone
    if backbone.time_coordinate == "tokens":
        return None
    intervals = (
        experiment.autoencoder.model.stride.t * backbone.patch.t / compute_all_sampled_fps(clips, experiment.limits)
    )
    return intervals if names is None else intervals[_find_numbers(clips, names)]


def _find_numbers(clips: ClipSource, names: Sequence[str]) -> Int64[np.ndarray, " n"]:
    """Return the number of the clip of each name."""
    numbers = pc.index_in(pa.array(names, pa.string()), value_set=pa.array(clips.column("name"), pa.string()))
    return numbers.to_numpy().astype(np.int64)


def make_online_batches(
    experiment: Experiment, mesh: Mesh, clips: ClipSource, texts: CaptionSource, encode: Encode
) -> BatchFactory:
    """Return rows, or bucket batches where the config has buckets, of clips that are encoded from their video files.

    Args:
      experiment: Its denoiser, size limits and weights are used.
      mesh: Devices that the rows are divided among.
      clips: The training clips.
      texts: Their captions.
      encode: `make_online_encoder` of the same experiment and clips.

    Raises:
      UserError: If not one example of some size fits into the memory of a bucket's batch.
    """
    config, model, weights = experiment.denoiser, experiment.autoencoder.model, experiment.data.used_weights
    buckets = None if config.buckets is None else make_buckets(experiment, mesh, clips)
    mixed = Mixture(sizes=clips.dataset_sizes, weights=weights) if weights else None

    def feed(start: int) -> DenoiserBatches:
        reading = _make_loader_config(experiment, mesh, start, mixed, threads=DECODE_THREADS)
        common: dict[str, Any] = {
            "latent_grid": functools.partial(latent_grid, stride=model.stride),
            "channels": model.channels,
            "limits": experiment.limits,
            "patch": config.backbone.patch,
            "config": reading,
            "token_dt": _compute_token_dt(experiment, clips),
        }
        if buckets is None:
            mask_mix = make_mask_mix(experiment)
            return load_encoded_batches(clips, texts, encode, shape=config.row_shape, mask_mix=mask_mix, **common)
        text_length = min(config.row_shape.text, config.text.max_tokens)
        return load_bucket_batches(clips, texts, encode, buckets, max_text=text_length, **common)

    return feed


def make_mask_mix(experiment: Experiment) -> MaskMix | None:
    """Return the draws of masks of known pixels; None for a denoiser with a first frame alone, or without it."""
    frames, model = experiment.denoiser.frame_conditioning, experiment.autoencoder.model
    if frames is None or not frames.has_mask_mix:
        return None
    return MaskMix(frames, experiment.seed, model.channels, model.stride)


def make_online_encoder(
    experiment: Experiment, mesh: Mesh, autoencoder_params: dict[str, Any], clips: ClipSource
) -> OnlineEncoder:
    """Return an encoder of clips as they are read; `autoencoder` are the autoencoder's parameters.

    Raises:
      UserError: If not one example of some size fits into the memory of a bucket's batch.
    """
    config, model = experiment.denoiser, experiment.autoencoder.model
    hosts = RowPart.from_mesh(mesh).part_count
    if config.buckets is not None:
        buckets = make_buckets(experiment, mesh, clips).buckets
        sizes = [bucket.size for bucket in buckets for _ in range(bucket.batch // hosts)]
        return OnlineEncoder(model, autoencoder_params, sizes)
    distinct, _, kinds = find_distinct_grids(fit_sizes(clips, experiment.limits))
    grids = [compute_token_grid(latent_grid(size, model.stride), config.backbone.patch) for size in distinct]
    tokens, sizes = sum(grids[kind].volume for kind in kinds.tolist()), [distinct[kind] for kind in kinds.tolist()]
    steps = tokens / (config.row_shape.tokens * config.batch / hosts)
    return OnlineEncoder(model, autoencoder_params, sizes, calls=max(1, _BATCHES_PER_STEP * steps))


def check_inputs(experiment: Experiment, partitioner: MeshPartitioner, clips: ClipSource) -> None:
    """Check that the denoiser can be trained on these clips, before the autoencoder is trained for hours.

    Raises:
      UserError: If rows, tokens, heads or hidden widths are not divisible by the devices, if the data set has no clips
        to train on, or if not one example of some size fits into the memory.
    """
    config, mesh, tokens = experiment.denoiser, partitioner.mesh, experiment.denoiser.row_shape.tokens
    if config.buckets is not None:
        make_buckets(experiment, mesh, clips)
        if mesh.shape["context"] > 1:
            rule = "the tokens of a clip may not be divisible by it; use layout=PackedShape(...), or context=1"
            raise UserError(f"context={mesh.shape['context']} is invalid with buckets: {rule}")
        check_denoiser(partitioner, config.backbone, rows=count_row_shards(mesh), tokens=tokens)
        return
    if config.batch // config.accumulation_steps % (shards := count_row_shards(mesh)):
        part = "" if config.accumulation_steps == 1 else f", in {config.accumulation_steps} parts,"
        raise UserError(f"a batch of {config.batch} rows{part} does not divide among {shards} devices; use a multiple")
    check_denoiser(partitioner, config.backbone, rows=config.batch // config.accumulation_steps, tokens=tokens)
    if experiment.data.used_weights:
        Mixture(sizes=clips.dataset_sizes, weights=experiment.data.used_weights)


def make_buckets(experiment: Experiment, mesh: AnyMesh, clips: ClipSource) -> Buckets:
    """Plan the buckets of these clips.

    Raises:
      UserError: If the config has no buckets, or if not one example of some size fits into the memory.
    """
    config, model, limits = experiment.denoiser, experiment.autoencoder.model, experiment.limits
    if config.buckets is None:
        raise UserError("the config has no buckets; set denoiser layout=BucketConfig(...)")

    def tokens(size: Grid) -> int:
        return compute_token_grid(latent_grid(size, model.stride), config.backbone.patch).volume

    return plan_buckets(
        fit_sizes(clips, limits),
        config.buckets.memory,
        budget=config.buckets.budget,
        count=config.buckets.count,
        devices=count_row_shards(mesh),
        max_batch=config.buckets.max_batch,
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
                f"set text width={texts.width} and backbone context_width={texts.width}"
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
    experiment: Experiment, mesh: Mesh, start: int, mixture: Mixture | None, *, threads: int
) -> LoaderConfig:
    config, part = experiment.denoiser, RowPart.from_mesh(mesh)
    backbone = config.backbone
    return LoaderConfig(
        batch=config.batch,
        seed=experiment.seed,
        start_step=start,
        host=part.part_index,
        hosts=part.part_count,
        threads=threads,
        workers=experiment.data.workers,
        mixture=mixture,
        balance=Balance(cost=Cost.from_width(backbone.width, layer_params=backbone.layer_params), batch=config.batch),
        attention_pairs=backbone.attention_pairs,
        token_lead=backbone.compute_token_lead(experiment.autoencoder.model.stride.t),
    )


def make_encoding(
    experiment: Experiment,
    params: dict[str, Any],
    *,
    text: Tokenizer | FrozenTextEncoder,
    images: FrozenImageEncoder | None,
) -> Encoding:
    """Return the encoding of an experiment, with the parameters of its autoencoder and its frozen encoders."""
    data, frames = experiment.data, experiment.denoiser.frame_conditioning
    frozen = text if isinstance(text, FrozenTextEncoder) else None
    views = Augmentations(clips_per_video=data.clips_per_video, resolutions=data.resolutions, flips=data.flips)
    return Encoding(
        autoencoder=experiment.autoencoder.model,
        params=params,
        limits=experiment.limits,
        augmentations=views,
        encode_text=frozen,
        text_identity="" if frozen is None else frozen.identity,
        encode_image=images,
        image_identity="" if images is None else images.identity,
        cond_latents=frames is not None and frames.rest == "grey" and not frames.has_mask_mix,
        masks=frames.masks if frames is not None and frames.has_mask_mix else (),
        conditioning=experiment.denoiser.backbone.conditioning,
    )
