"""Input of the denoiser's training: rows of cached latents, or of clips that are encoded while they are read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jax.sharding import Mesh
from jaxtyping import Float, Int, Int64

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharedStrings
from dit_video.data.buckets import Buckets, plan_buckets
from dit_video.data.captions import CaptionSource, EmbeddedCaptions, TokenizedCaptions, get_distinct_captions
from dit_video.data.clips import ClipSource
from dit_video.data.examples import ExampleTable, compute_attention_pairs
from dit_video.data.latents.cache import CachedCaptions, LatentSource
from dit_video.data.latents.online import OnlineEncoder
from dit_video.data.latents.plan import Augmentations, Encoding
from dit_video.data.packing.balance import Cost
from dit_video.data.packing.mask_mix import MaskMix
from dit_video.data.packing.mixture import Mixture
from dit_video.data.rows import ExampleSource, RowSpec, RowStream, load_rows
from dit_video.data.sizes import compute_all_sampled_fps, fit_sizes
from dit_video.data.sources import (
    CACHE_BYTES,
    ClipExamples,
    Encode,
    LatentExamples,
    OnlineEncoding,
    compute_clip_grids,
    compute_latent_grids,
)
from dit_video.distributed import RowPart, check_denoiser, count_row_shards
from dit_video.experiment.config import Experiment
from dit_video.models.autoencoders import latent_grid
from dit_video.models.encoders import Tokenizer
from dit_video.tokens import Grid, compute_token_grid
from dit_video.training.hooks.logging import Progress
from dit_video.weights.frozen_encoders import FrozenImageEncoder, FrozenTextEncoder

_BATCHES_PER_STEP = 4
"""Number of encoder batches per canvas size that a step's clips are divided into.  The number of clips varies from step
to step, so the last batch is half empty on average: an eighth of the work."""

OpenRows = Callable[[int], RowStream]
"""Opens the batches from a step on."""


def make_latent_examples(
    experiment: Experiment, latents: LatentSource, clips: ClipSource, captions: CaptionSource
) -> LatentExamples:
    """Return the examples of cached latents of these clips; `captions` are those of the latents.

    Raises:
      UserError: If the patch does not divide the latents.
    """
    patch, data = experiment.denoiser.backbone.patch, experiment.data
    table = _make_table(
        experiment,
        names=SharedStrings(latents.names),
        grids=compute_latent_grids(latents, patch),
        captions=captions,
        mixture=make_mixture(latents, clips, data.used_weights),
        token_dt=_compute_token_dt(experiment, clips, latents.clips),
    )
    cache_bytes = CACHE_BYTES // max(1, data.workers)
    return LatentExamples(latents, table, patch=patch, mask_mix=make_mask_mix(experiment), cache_bytes=cache_bytes)


def make_clip_examples(
    experiment: Experiment, clips: ClipSource, captions: CaptionSource, encode: Encode
) -> ClipExamples:
    """Return the examples of clips that are encoded from their video files.

    Args:
      experiment: Its denoiser, size limits and weights are used.
      clips: The clips.
      captions: Their captions.
      encode: `make_online_encoder` of the same experiment and clips.

    Raises:
      UserError: If a clip has no size within the limits.
    """
    model, backbone, weights = experiment.autoencoder.model, experiment.denoiser.backbone, experiment.data.used_weights
    table = _make_table(
        experiment,
        names=SharedStrings(clips.column("name")),
        grids=compute_clip_grids(clips, experiment.limits, stride=model.stride, patch=backbone.patch),
        captions=captions,
        mixture=Mixture(sizes=clips.dataset_sizes, weights=weights) if weights else None,
        token_dt=_compute_token_dt(experiment, clips),
    )
    encoding = OnlineEncoding(
        encode=encode,
        limits=experiment.limits,
        stride=model.stride,
        channels=model.channels,
        patch=backbone.patch,
        mask_mix=make_mask_mix(experiment),
        conditioning=backbone.conditioning,
    )
    return ClipExamples(clips, table, encoding)


def open_rows(experiment: Experiment, mesh: Mesh, source: ExampleSource[Any], clips: ClipSource) -> OpenRows:
    """Return what opens the rows of a training, or its dense batches where the config has buckets.

    Args:
      experiment: Its denoiser and seed are used.
      mesh: Devices that the rows are divided among.
      source: The examples.
      clips: Clips of the examples, by which buckets are planned.

    Raises:
      UserError: If not one example of some size fits into the memory of a bucket's batch.
    """
    config, backbone, part = experiment.denoiser, experiment.denoiser.backbone, RowPart.from_mesh(mesh)
    spec = RowSpec(
        layout=config.row_shape if config.buckets is None else make_buckets(experiment, mesh, clips),
        batch=config.batch,
        cost=Cost.from_width(backbone.width, layer_params=backbone.layer_params),
    )
    return lambda start: load_rows(
        source,
        spec,
        seed=experiment.seed,
        start=start,
        host=part.part_index,
        hosts=part.part_count,
        workers=experiment.data.workers,
    )


def _make_table(experiment: Experiment, *, grids: Int[np.ndarray, "n 3"], **columns: Any) -> ExampleTable:
    backbone = experiment.denoiser.backbone
    return ExampleTable(
        grids=grids,
        attention_pairs=compute_attention_pairs(grids, backbone.attention_pairs),
        token_lead=backbone.compute_token_lead(experiment.autoencoder.model.stride.t),
        **columns,
    )


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


def make_mask_mix(experiment: Experiment) -> MaskMix | None:
    """Return the draws of masks of known pixels; None for a denoiser with a first frame alone, or without it."""
    frames, model = experiment.denoiser.frame_conditioning, experiment.autoencoder.model
    if frames is None or not frames.has_mask_mix:
        return None
    return MaskMix(frames, experiment.seed, model.channels, model.stride)


def make_online_encoder(
    experiment: Experiment, mesh: Mesh, autoencoder_params: dict[str, Any], clips: ClipSource
) -> OnlineEncoder:
    """Return an encoder of clips as they are read.

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
    volumes = np.asarray([_compute_token_grid(experiment, size).volume for size in distinct])
    tokens, sizes = int(volumes[kinds].sum(axis=0)), [distinct[kind] for kind in kinds.tolist()]
    steps = tokens / (config.row_shape.tokens * config.batch / hosts)
    return OnlineEncoder(model, autoencoder_params, sizes, calls=max(1, _BATCHES_PER_STEP * steps))


def check_inputs(experiment: Experiment, mesh: Mesh, clips: ClipSource) -> None:
    """Check that the denoiser can be trained on these clips, before the autoencoder is trained for hours.

    Raises:
      UserError: If rows, tokens, heads or hidden widths are not divisible by the devices, if the data set has no clips
        to train on or lacks a column that conditioning reads, or if not one example of some size fits into the memory.
    """
    config = experiment.denoiser
    clips.check_columns([name for each in config.backbone.conditioning for name in each.columns])
    attention = experiment.mesh.context_attention
    options: dict[str, Any] = {"tokens": config.row_shape.tokens, "context_attention": attention}
    if config.buckets is not None:
        make_buckets(experiment, mesh, clips)
        if mesh.shape["context"] > 1:
            rule = "the tokens of a clip may not be divisible by it; use layout=PackedShape(...), or context=1"
            raise UserError(f"context={mesh.shape['context']} is invalid with buckets: {rule}")
        check_denoiser(mesh, config.backbone, rows=count_row_shards(mesh), **options)
        return
    if config.batch // config.accumulation_steps % (shards := count_row_shards(mesh)):
        part = "" if config.accumulation_steps == 1 else f", in {config.accumulation_steps} parts,"
        raise UserError(f"a batch of {config.batch} rows{part} does not divide among {shards} devices; use a multiple")
    check_denoiser(mesh, config.backbone, rows=config.batch // config.accumulation_steps, **options)
    if experiment.data.used_weights:
        Mixture(sizes=clips.dataset_sizes, weights=experiment.data.used_weights)


def make_buckets(experiment: Experiment, mesh: Mesh, clips: ClipSource) -> Buckets:
    """Plan the buckets of these clips.

    Raises:
      UserError: If the config has no buckets, or if not one example of some size fits into the memory.
    """
    config = experiment.denoiser
    if config.buckets is None:
        raise UserError("the config has no buckets; set denoiser layout=BucketConfig(...)")
    return plan_buckets(
        fit_sizes(clips, experiment.limits),
        config.buckets.memory,
        budget=config.buckets.budget,
        text=min(config.row_shape.text, config.text.max_tokens),
        count=config.buckets.count,
        devices=count_row_shards(mesh),
        max_batch=config.buckets.max_batch,
        to_tokens=functools.partial(_compute_token_grid, experiment),
    )


def _compute_token_grid(experiment: Experiment, size: Grid) -> Grid:
    """Return the size in tokens of a clip of this size in pixels."""
    return compute_token_grid(
        latent_grid(size, experiment.autoencoder.model.stride), experiment.denoiser.backbone.patch
    )


def open_captions(
    text_encoder: Tokenizer | FrozenTextEncoder, clips: ClipSource, *, cached: LatentSource | None = None
) -> CaptionSource:
    """Return the captions of every example as rows hold them: text tokens, or embeddings of a frozen encoder.

    The examples are the clips, or those of the cached latents, with which the embeddings are `cached`, too.

    Raises:
      UserError: If the latents were encoded without the captions, or if the embeddings have another width.
    """
    shares = clips.compute_caption_shares()
    captions = clips.column("captions") if cached is None else cached.all_captions
    if shares is not None and cached is not None:
        ends = np.cumsum([len(each) or 1 for each in clips.column("captions")])
        parts = np.split(shares, ends[:-1])
        shares = np.concatenate([parts[number] for number in _find_numbers(clips, cached.clips)])
    if not isinstance(text_encoder, FrozenTextEncoder):
        return TokenizedCaptions(captions, text_encoder, shares=shares)
    if cached is not None:
        source = CachedCaptions(cached, shares=shares)
        if source.width != text_encoder.config.width:
            raise UserError(
                f"{cached.folder} holds embeddings of width {source.width}, the config says "
                f"{text_encoder.config.width}; set text width={source.width} and backbone context_width={source.width}"
            )
        return source
    with Progress("embedding captions", len(get_distinct_captions(captions)), unit="caption") as progress:
        return EmbeddedCaptions(
            captions,
            text_encoder.encode_many,
            identity=text_encoder.identity,
            count_tokens=text_encoder.count_tokens,
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


def make_encoding(
    experiment: Experiment,
    params: dict[str, Any],
    *,
    text_encoder: Tokenizer | FrozenTextEncoder,
    images: FrozenImageEncoder | None,
) -> Encoding:
    """Return the encoding of an experiment, with the parameters of its autoencoder and its frozen encoders."""
    data, frames = experiment.data, experiment.denoiser.frame_conditioning
    frozen = text_encoder if isinstance(text_encoder, FrozenTextEncoder) else None
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
