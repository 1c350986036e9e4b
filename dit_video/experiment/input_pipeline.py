"""Input of the denoiser's training: rows of cached latents, or of clips that are encoded while they are read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int, Int64

from dit_video.core.errors import UserError
from dit_video.core.grid import find_distinct_grids
from dit_video.core.shared_array import SharedStrings
from dit_video.data.buckets import BucketConfig, Buckets, plan_buckets
from dit_video.data.captions import CaptionSource, EmbeddedCaptions, TokenizedCaptions, get_distinct_captions
from dit_video.data.clips import ClipSource
from dit_video.data.examples import ExampleTable, compute_attention_pairs
from dit_video.data.latents.cache import CachedCaptions, LatentSource
from dit_video.data.latents.online import OnlineEncoder
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
from dit_video.experiment.run import Run
from dit_video.experiment.training_config import DenoiserTraining
from dit_video.models.autoencoders import latent_grid
from dit_video.models.encoders import Tokenizer
from dit_video.models.model_config import ModelConfig
from dit_video.tokens import Grid, compute_token_grid
from dit_video.training.hooks.logging import Progress
from dit_video.weights.frozen_encoders import FrozenTextEncoder

_BATCHES_PER_STEP = 4
"""Number of encoder batches per canvas size that a step's clips are divided into.  The number of clips varies from step
to step, so the last batch is half empty on average: an eighth of the work."""

OpenRows = Callable[[int], RowStream]
"""Opens the batches from a step on."""


def make_latent_examples(run: Run, latents: LatentSource, captions: CaptionSource) -> LatentExamples:
    """Return the examples of cached latents of the training clips; `captions` are those of the latents.

    Raises:
      UserError: If the patch does not divide the latents.
    """
    patch, clips, data = run.model.backbone.patch, run.training_clips, run.data
    table = _make_table(
        run.model,
        names=SharedStrings(latents.names),
        grids=compute_latent_grids(latents, patch),
        captions=captions,
        mixture=make_mixture(latents, clips, data.used_weights),
        token_dt=_compute_token_dt(run, clips, latents.clips),
    )
    cache_bytes = CACHE_BYTES // max(1, data.workers)
    return LatentExamples(latents, table, patch=patch, mask_mix=make_mask_mix(run), cache_bytes=cache_bytes)


def make_clip_examples(run: Run, clips: ClipSource, captions: CaptionSource, encode: Encode) -> ClipExamples:
    """Return the examples of clips that are encoded from their video files.

    Args:
      run: The run, as the stage sees it.
      clips: The clips.
      captions: Their captions.
      encode: `make_online_encoder` of the same run and clips.

    Raises:
      UserError: If a clip has no size within the limits.
    """
    autoencoder, backbone, weights = run.model.autoencoder, run.model.backbone, run.data.used_weights
    table = _make_table(
        run.model,
        names=SharedStrings(clips.column("name")),
        grids=compute_clip_grids(clips, run.limits, stride=autoencoder.stride, patch=backbone.patch),
        captions=captions,
        mixture=Mixture(sizes=clips.dataset_sizes, weights=weights) if weights else None,
        token_dt=_compute_token_dt(run, clips),
    )
    encoding = OnlineEncoding(
        encode=encode,
        limits=run.limits,
        stride=autoencoder.stride,
        channels=autoencoder.channels,
        patch=backbone.patch,
        mask_mix=make_mask_mix(run),
        conditioning=run.open_conditioning(run.read_autoencoder()) if backbone.conditioning else (),
    )
    return ClipExamples(clips, table, encoding)


def open_rows(run: Run, training: DenoiserTraining, source: ExampleSource[Any], clips: ClipSource) -> OpenRows:
    """Return what opens the rows of a training, or its dense batches where the config has buckets.

    Args:
      run: The run, as the stage sees it.
      training: The training.
      source: The examples.
      clips: Clips of the examples, by which buckets are planned.

    Raises:
      UserError: If not one example of some size fits into the memory of a bucket's batch.
    """
    model, backbone, part = run.model, run.model.backbone, RowPart.from_mesh(run.mesh)
    assert model.layout is not None  # which the stage checks
    cost = Cost.from_width(backbone.width, layer_params=backbone.layer_params)
    spec: RowSpec | Buckets = RowSpec(layout=model.layout, batch=training.batch, cost=cost)
    if training.buckets is not None:
        spec = make_buckets(run, training.buckets, clips)
    return lambda start: load_rows(
        source,
        spec,
        seed=run.seed,
        start=start,
        host=part.part_index,
        hosts=part.part_count,
        workers=run.data.workers,
    )


def _make_table(model: ModelConfig, *, grids: Int[np.ndarray, "n 3"], **columns: Any) -> ExampleTable:
    return ExampleTable(
        grids=grids,
        attention_pairs=compute_attention_pairs(grids, model.backbone.attention_pairs),
        token_lead=model.token_lead,
        **columns,
    )


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


def make_mask_mix(run: Run) -> MaskMix | None:
    """Return the draws of masks of known pixels; None for a denoiser with a first frame alone, or without it."""
    frames, autoencoder = run.model.frame_conditioning, run.model.autoencoder
    if frames is None or not frames.has_mask_mix:
        return None
    return MaskMix(frames, run.seed, autoencoder.channels, autoencoder.stride)


def make_online_encoder(
    run: Run, training: DenoiserTraining, autoencoder_params: dict[str, Any], clips: ClipSource
) -> OnlineEncoder:
    """Return an encoder of clips as they are read.

    Raises:
      UserError: If not one example of some size fits into the memory of a bucket's batch.
    """
    autoencoder, hosts = run.model.autoencoder, RowPart.from_mesh(run.mesh).part_count
    if training.buckets is not None:
        buckets = make_buckets(run, training.buckets, clips).buckets
        sizes = [bucket.size for bucket in buckets for _ in range(bucket.batch // hosts)]
        return OnlineEncoder(autoencoder, autoencoder_params, sizes)
    distinct, _, kinds = find_distinct_grids(fit_sizes(clips, run.limits))
    volumes = np.asarray([_compute_token_grid(run.model, size).volume for size in distinct])
    tokens, sizes = int(volumes[kinds].sum(axis=0)), [distinct[kind] for kind in kinds.tolist()]
    steps = tokens / (run.model.row_shape.tokens * training.batch / hosts)
    return OnlineEncoder(autoencoder, autoencoder_params, sizes, calls=max(1, _BATCHES_PER_STEP * steps))


def check_inputs(run: Run, training: DenoiserTraining) -> None:
    """Check that the denoiser can be trained on the run's clips, before the autoencoder is trained for hours.

    Raises:
      UserError: If rows, tokens, heads or hidden widths are not divisible by the devices, if the data set has no clips
        to train on or lacks a column that conditioning reads, or if not one example of some size fits into the memory.
    """
    model, mesh, clips, tokens = run.model, run.mesh, run.training_clips, run.model.row_shape.tokens
    clips.check_columns([name for each in model.backbone.conditioning for name in each.columns])
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
    rows = training.batch // training.accumulation_steps
    check_denoiser(run.partitioner, model.backbone, rows=rows, tokens=tokens)
    if run.data.used_weights:
        Mixture(sizes=clips.dataset_sizes, weights=run.data.used_weights)


def make_buckets(run: Run, config: BucketConfig, clips: ClipSource) -> Buckets:
    """Plan the buckets of these clips.

    Raises:
      UserError: If not one example of some size fits into the memory.
    """
    return plan_buckets(
        fit_sizes(clips, run.limits),
        config.memory,
        budget=config.budget,
        text=min(run.model.row_shape.text, run.model.text_encoder.max_tokens),
        count=config.count,
        devices=count_row_shards(run.mesh),
        max_batch=config.max_batch,
        to_tokens=functools.partial(_compute_token_grid, run.model),
    )


def _compute_token_grid(model: ModelConfig, size: Grid) -> Grid:
    """Return the size in tokens of a clip of this size in pixels."""
    return compute_token_grid(latent_grid(size, model.autoencoder.stride), model.backbone.patch)


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
                f"{text_encoder.config.width}; set text_encoder width={source.width} and backbone "
                f"context_width={source.width}"
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
