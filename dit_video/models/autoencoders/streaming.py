"""Encoding and decoding of clips of any length and size: one chunk of frames and one tile of the picture at a time.

A causal autoencoder's chunks equal the whole clip's, as its layers' caches are passed from chunk to chunk, so memory
does not grow with a clip's length. At most two programs are compiled for any length: one for a clip's first chunk, one
for the others. The last chunk is padded with its own last frame, whose output is cut off.

Tiles differ from the whole picture near their borders; see `Tiles`. Sharding the height over devices is exact: XLA
exchanges the rows at the devices' borders before every convolution, and gathers the height for attention within a
frame.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key, UInt8

from dit_video.core.errors import UserError, check_at_least
from dit_video.core.memory import count_bytes, count_peak_bytes
from dit_video.core.rng import key
from dit_video.models.autoencoders.config import AutoencoderConfig
from dit_video.models.autoencoders.interface import latent_grid
from dit_video.nn import ConvCache, get_graph_def, get_param_shapes
from dit_video.tokens import Grid


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the tiles of a picture that does not fit in memory, in multiples of the autoencoder's spatial stride.

    A tile does not see pixels beyond its border, which changes its own pixels there; blending spreads the difference
    over the overlap. It is smaller for larger overlaps; `measure_tiling_error` computes it.

    Raises:
      UserError: If a tile is not larger than twice its overlap.
    """

    height: int
    """Height of a tile in pixels."""
    width: int
    """Width of a tile in pixels."""
    overlap: int
    """Pixels shared by neighbouring tiles."""

    def __post_init__(self):
        if self.overlap < 0 or min(self.height, self.width) <= 2 * self.overlap:
            raise UserError(
                f"overlap={self.overlap} is invalid for tiles of {self.height}x{self.width} pixels: use less than half "
                "a side"
            )


class Tile(NamedTuple):
    """The position and size of a tile, in latent positions."""

    row: int
    column: int
    height: int
    width: int


def cut_tiles(height: int, width: int, tiles: Tiles | None, stride: Grid) -> list[Tile]:
    """Return tiles of one size for a picture of `height` by `width` latent positions; a single tile for None.

    Raises:
      UserError: If the stride does not divide the tiles.
    """
    if tiles is None:
        return [Tile(0, 0, height, width)]
    for name, length, step in (
        ("height", tiles.height, stride.h),
        ("width", tiles.width, stride.w),
        ("overlap", tiles.overlap, stride.h),
        ("overlap", tiles.overlap, stride.w),
    ):
        if length % step:
            raise UserError(f"the tiles' {name} {length} is not divisible by the spatial stride {step}; use a multiple")
    rows = _compute_starts(height, tiles.height // stride.h, tiles.overlap // stride.h)
    columns = _compute_starts(width, tiles.width // stride.w, tiles.overlap // stride.w)
    size = min(height, tiles.height // stride.h), min(width, tiles.width // stride.w)
    return [Tile(row, column, *size) for row in rows for column in columns]


def compute_blend_weights(
    tiles: Sequence[Tile], tile: Tile, scale: tuple[int, int] = (1, 1)
) -> Float32[np.ndarray, "H W"]:
    """Return the blend weight of each pixel of a tile, with `scale` pixels (rows, columns) per latent position.

    The weights are linear ramps over the overlaps with neighbours (as in diffusers' tiled autoencoders), and one
    elsewhere.
    """
    rows = _compute_ramp(sorted({other.row for other in tiles}), tile.row, tile.height, scale[0])
    columns = _compute_ramp(sorted({other.column for other in tiles}), tile.column, tile.width, scale[1])
    return rows[:, None] * columns[None]


def _compute_starts(length: int, size: int, overlap: int) -> list[int]:
    """Return the first positions of tiles; the last tile ends at the border."""
    if length <= size:
        return [0]
    count = -(-(length - overlap) // (size - overlap))
    return [min(index * (size - overlap), length - size) for index in range(count)]


def _compute_ramp(starts: Sequence[int], start: int, size: int, scale: int) -> Float32[np.ndarray, " n"]:
    """Return the normalised weights along one axis of the tile at `start`."""
    offsets = np.arange(start * scale, (start + size) * scale) - scale * np.asarray(starts)[:, None]
    inside = (offsets >= 0) & (offsets < size * scale)
    # They rise linearly from both borders of each tile; dividing by the sum keeps only the overlap's ramp.
    tents = np.where(inside, np.minimum(offsets + 0.5, size * scale - offsets - 0.5), 0.0)
    return (tents[list(starts).index(start)] / tents.sum(0)).astype(np.float32)


OptionalSharding = jax.sharding.Sharding | None


def decode_stream(
    config: AutoencoderConfig,
    params: dict[str, Any],
    latents: Iterable[Float[np.ndarray, "B _ h w c"]],
    *,
    chunk: int = 1,
    tiles: Tiles | None = None,
    sharding: OptionalSharding = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[UInt8[np.ndarray, "B _ H W 3"]]:
    """Yield the frames of latents that come in portions of any length, such as those of a clip while it is sampled.

    The frames equal those of all latents at once. Those of a chunk are yielded when the next chunk is being decoded.

    Args:
      config: Configuration of an autoencoder.
      params: Its parameters.
      latents: Portions of normalised latents, one after the other in time: `[latents]` for whole clips.
      chunk: Latent frames per chunk of a causal decoder; a decoder that sees later frames gets all of them at once.
      tiles: Sizes of tiles for pictures that do not fit in memory; None decodes whole pictures.
      sharding: Sharding of a chunk's latents, such as `NamedSharding(mesh, P(None, None, "context"))` for height.
      seeds: Seed of each clip, for decoders that take noise; 0 by default.

    Raises:
      UserError: If there are no latents, a portion has another shape than [B t h w channels] with the first one's
        clips, height and width, a chunk has no frames, tiles don't fit the stride or their decoder takes noise, the
        number of devices does not divide the height, or pixels are NaN or infinite.
    """
    check_at_least(1, chunk=chunk)
    portions = _check_latents(latents, config.channels)
    if config.is_decoder_symmetric:
        whole = [np.concatenate(list(portions), axis=1)]
        chunk, portions = whole[0].shape[1], iter(whole)
    chunks = _regroup(portions, chunk, chunk)
    first = next(chunks)
    clips, _, height, width, _ = first.shape
    _check_rows(sharding, height, "latent rows")
    tile_plan = cut_tiles(height, width, tiles, config.stride)
    keys = None
    if config.decode_time is not None:
        if len(tile_plan) > 1:
            raise UserError("tiles are invalid: this decoder takes noise, which tiles do not share. Use tiles=None.")
        keys = jnp.stack([key(seed, "decoder") for seed in seeds or [0] * clips])
    all_chunks = itertools.chain([first], chunks)
    coded_chunks = _run_chunks(config, params, all_chunks, tile_plan, "decode", chunk, sharding, keys)
    for coded, bad, count, is_first in coded_chunks:
        _check_finite(bad)
        frames = count * config.stride.t - (config.stride.t - 1 if is_first else 0)
        yield np.asarray(coded)[:, :frames]


def encode_stream(
    config: AutoencoderConfig,
    params: dict[str, Any],
    frames: Iterable[UInt8[np.ndarray, "B _ H W 3"] | Float32[np.ndarray, "B _ H W 3"]],
    *,
    chunk: int = 1,
    tiles: Tiles | None = None,
    sharding: OptionalSharding = None,
) -> Iterator[Float32[np.ndarray, "B _ h w c"]]:
    """Yield the normalised latents of frames that come in portions of any length.

    Args:
      config: Configuration of a causal autoencoder.
      params: Its parameters.
      frames: Portions of frames in 0..255, 1 + k * temporal stride frames in all.
      chunk: Latent frames per chunk.
      tiles: Sizes of tiles for pictures that do not fit in memory; None encodes whole pictures.
      sharding: Sharding of a chunk's frames.

    Raises:
      UserError: If frames are not [B T H W 3] in 0..255, a chunk has no frames, tiles or frames do not fit the stride
        (the number of frames is checked when they end), or the number of devices does not divide the height.
    """
    check_at_least(1, chunk=chunk)
    stride = config.stride
    chunks = _regroup(_check_frames(frames, stride), 1 + (chunk - 1) * stride.t, chunk * stride.t)
    first = next(chunks)
    _check_rows(sharding, first.shape[2], "rows of pixels")
    grid = latent_grid(Grid(1, *first.shape[2:4]), stride)
    tile_plan = cut_tiles(grid.h, grid.w, tiles, stride)

    all_chunks = itertools.chain([first], chunks)
    for coded, _, count, is_first in _run_chunks(config, params, all_chunks, tile_plan, "encode", chunk, sharding):
        yield np.asarray(coded)[:, : 1 + (count - 1) // stride.t if is_first else count // stride.t]


@functools.lru_cache(maxsize=64)
def estimate_chunk_bytes(config: AutoencoderConfig, method: str, clips: int, latents: Grid) -> int:
    """Estimate the memory of coding a chunk of whole pictures, without the parameters; see `count_peak_bytes`.

    Args:
      config: Configuration of a causal autoencoder.
      method: `encode` or `decode`.
      clips: Number of clips.
      latents: Latent frames of the chunk, and the height and width of the latents.
    """
    run, arguments = make_chunk_program(config, method, clips, latents)
    program = jax.make_jaxpr(run)(*arguments)
    return count_peak_bytes(program) + count_bytes(arguments[1:])


def make_chunk_program(
    config: AutoencoderConfig, method: str, clips: int, latents: Grid
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the program that codes a chunk of whole pictures after the first one, and the shapes of its arguments.

    The arguments are as in `estimate_chunk_bytes`.
    """
    run, stride = _jit_method(config, method), config.stride
    if method == "decode":
        first = values = jax.ShapeDtypeStruct((clips, *latents, config.channels), jnp.float32)
    else:
        frames, size = latents.t * stride.t, (latents.h * stride.h, latents.w * stride.w, 3)
        values = jax.ShapeDtypeStruct((clips, frames, *size), jnp.uint8)
        first = jax.ShapeDtypeStruct((clips, frames - stride.t + 1, *size), jnp.uint8)
    noise: tuple[Any, ...] = ()
    if method == "decode" and config.decode_time is not None:
        noise = (jax.eval_shape(lambda: jax.random.split(jax.random.key(0), clips)),)
    params = get_param_shapes(config.make)
    _, cache = jax.eval_shape(run, params, first, None, *noise)
    return run, (params, values, cache, *noise)


class TilingError(NamedTuple):
    """Differences between tiled and whole pictures, in pixels of [-1, 1]."""

    largest: float
    """Largest absolute difference."""
    mean: float
    """Mean absolute difference."""


def measure_tiling_error(
    config: AutoencoderConfig, params: dict[str, Any], latents: Float[np.ndarray, "B t h w c"], tiles: Tiles
) -> TilingError:
    """Measure the effect of tiles on decoded frames, in steps of 1/127.5 as frames are uint8."""
    streams = (decode_stream(config, params, [latents], tiles=each) for each in (None, tiles))
    errors = [np.abs(a.astype(np.float32) - b) / 127.5 for a, b in zip(*streams, strict=True)]
    return TilingError(max(float(error.max()) for error in errors), float(np.mean([error.mean() for error in errors])))


def _check_rows(sharding: OptionalSharding, rows: int, unit: str) -> None:
    if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec) > 2 and sharding.spec[2] is not None:
        axes = sharding.spec[2] if isinstance(sharding.spec[2], tuple) else (sharding.spec[2],)
        devices = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
        if rows % devices:
            raise UserError(f"{rows} {unit} are not divisible by the {devices} devices; change height or devices")


def _check_latents(
    portions: Iterable[Float[np.ndarray, "B _ h w c"]], channels: int
) -> Iterator[Float[np.ndarray, "B _ h w c"]]:
    """Yield the portions, checked.

    Raises:
      UserError: If there are none, or one has another shape than [B t h w channels] with the first one's sizes.
    """
    total, first = 0, None
    for portion in portions:
        shape = list(portion.shape)
        if portion.ndim != 5 or portion.shape[-1] != channels:
            raise UserError(f"latents {shape} are invalid. Use portions [B t h w {channels}], such as [latents]")
        first = shape if first is None else first
        if [shape[0], *shape[2:]] != [first[0], *first[2:]]:
            raise UserError(f"latents {shape} are invalid after {first}. Use portions that differ in t alone")
        total += portion.shape[1]
        yield portion
    if not total:
        raise UserError("latents are empty: there is nothing to decode. Use at least one latent frame")


def _check_frames(
    portions: Iterable[UInt8[np.ndarray, "B _ H W 3"] | Float32[np.ndarray, "B _ H W 3"]], stride: Grid
) -> Iterator[UInt8[np.ndarray, "B _ H W 3"] | Float32[np.ndarray, "B _ H W 3"]]:
    """Yield the portions, checked.

    Raises:
      UserError: If there are none, one is not [B T H W 3] in 0..255, or their frames are not 1 + k * stride in all.
    """
    total, size = 0, (0, 0)
    for portion in portions:
        if not _is_pixel_array(portion):
            raise UserError(
                f"frames {portion.dtype} {list(portion.shape)} are invalid: must be [B T H W 3] in 0..255, uint8 or "
                "float32. Use frames of this shape and type"
            )
        total, size = total + portion.shape[1], portion.shape[2:4]
        yield portion
    if not total:
        raise UserError("frames are empty: there is nothing to encode. Use at least one frame")
    latent_grid(Grid(total, *size), stride)


def _is_pixel_array(frames: np.ndarray) -> bool:
    if frames.ndim != 5 or frames.shape[-1] != 3:
        return False
    if frames.dtype == np.uint8:
        return True
    # The comparisons are false for NaN.
    return frames.dtype == np.float32 and bool((frames >= 0).all() and (frames <= 255).all())


def _regroup(portions: Iterable[np.ndarray], first: int, length: int) -> Iterator[np.ndarray]:
    """Yield a portion of `first` frames, then portions of `length`; the last one may be shorter."""
    buffer: list[np.ndarray] = []
    needed = first
    for portion in portions:
        buffer.append(portion)
        while sum(part.shape[1] for part in buffer) >= needed:
            joined = buffer[0] if len(buffer) == 1 else np.concatenate(buffer, axis=1)
            yield joined[:, :needed]
            buffer, needed = [joined[:, needed:]], length
    rest = np.concatenate(buffer, axis=1)
    if rest.shape[1]:
        yield rest


def _run_chunks(
    config: AutoencoderConfig,
    params: dict[str, Any],
    chunks: Iterable[np.ndarray],
    tiles: list[Tile],
    method: str,
    chunk: int,
    sharding: OptionalSharding,
    keys: Key[Array, " B"] | None = None,
) -> Iterator[tuple[Array, Array | None, int, bool]]:
    """Yield for each chunk its output including padding, its length before padding, and whether it is the first.

    The second value is the number of each clip's pixels that are not finite, which integers cannot show.

    An output is yielded after the next chunk is dispatched, so that its transfer overlaps with that computation.
    """
    stride = config.stride
    # Input and output pixels, or latents, per latent position.
    source, target = ((1, 1), (stride.h, stride.w)) if method == "decode" else ((stride.h, stride.w), (1, 1))
    run = _jit_method(config, method)
    caches: list[tuple[Array, ...] | None] = [None] * len(tiles)  # the cache of each tile; None before the first chunk
    blend_weights = [jnp.asarray(compute_blend_weights(tiles, tile, target)) for tile in tiles]
    height = target[0] * max(tile.row + tile.height for tile in tiles)
    width = target[1] * max(tile.column + tile.width for tile in tiles)
    previous: tuple[Array, Array | None, int, bool] | None = None
    for index, chunk_values in enumerate(chunks):
        noise = () if keys is None else (jax.vmap(jax.random.fold_in, (0, None))(keys, index),)
        is_first = caches[0] is None
        full = chunk if method == "decode" else chunk * stride.t - (stride.t - 1 if is_first else 0)
        padded = np.concatenate([chunk_values, *[chunk_values[:, -1:]] * (full - chunk_values.shape[1])], axis=1)
        blended = None
        for number, tile in enumerate(tiles):
            tile_values = _slice_tile(padded, tile, source)
            tile_array = jax.device_put(tile_values, sharding) if sharding is not None else tile_values
            tile_output, caches[number] = run(params, tile_array, caches[number], *noise)
            if len(tiles) == 1:
                blended = tile_output
                continue
            if blended is None:
                blended = jnp.zeros((*tile_output.shape[:2], height, width, tile_output.shape[-1]))
            corner = jnp.asarray([tile.row * target[0], tile.column * target[1]])
            blended = _add_tile(blended, tile_output, blend_weights[number], corner)
        assert blended is not None
        output, bad = _to_uint8(blended) if method == "decode" else (blended, None)
        if previous is not None:
            yield previous
        previous = output, bad, chunk_values.shape[1], is_first
    if previous is not None:
        yield previous


def _slice_tile(values: np.ndarray, tile: Tile, scale: tuple[int, int]) -> np.ndarray:
    rows = slice(tile.row * scale[0], (tile.row + tile.height) * scale[0])
    columns = slice(tile.column * scale[1], (tile.column + tile.width) * scale[1])
    return values[:, :, rows, columns]


@functools.lru_cache(maxsize=16)
def _jit_method(config: AutoencoderConfig, method: str):
    """Return a jitted method of the autoencoder on one chunk, which returns its output and the cache for the next."""
    graph = get_graph_def(config.make)

    @functools.partial(jax.jit, donate_argnums=2)
    def run(params, values, previous_cache, keys=None):
        cache = ConvCache(previous_cache)
        model = nnx.merge(graph, params)
        if method == "decode":
            options = {} if config.decode_time is None else {"time": config.decode_time, "keys": keys}
            return model.decode(values, cache=cache, **options), cache.features
        return model.encode(values.astype(jnp.float32) * (2 / 255) - 1, cache=cache), cache.features

    return run


@functools.partial(jax.jit, donate_argnums=0)
def _add_tile(canvas: Array, values: Array, blend_weights: Array, corner: Array) -> Array:
    """Add a tile's weighted values to the picture."""
    zero = jnp.zeros((), corner.dtype)
    start = (zero, zero, corner[0], corner[1], zero)
    background = jax.lax.dynamic_slice(canvas, start, values.shape)
    return jax.lax.dynamic_update_slice(canvas, background + values * blend_weights[..., None], start)


@jax.jit
def _to_uint8(pixels: Float[Array, "B T H W 3"]) -> tuple[UInt8[Array, "B T H W 3"], Int[Array, " B"]]:
    """Return the pixels in 0..255, and the number of values of each clip that are not finite."""
    bad = (~jnp.isfinite(pixels)).sum(axis=(1, 2, 3, 4))
    return jnp.clip(jnp.rint((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8), bad


def _check_finite(bad: Int[Array, " B"] | None) -> None:
    """Check the numbers of values of each clip that are not finite.

    Raises:
      UserError: If a clip has some.
    """
    if bad is not None and (clips := int((np.asarray(bad) > 0).sum(axis=0))):
        raise UserError(
            f"decoded pixels of {clips} of {len(bad)} clips are NaN or infinite, {int(np.asarray(bad).sum(axis=0))} "
            "values: the autoencoder's weights are damaged, or its latents are far from those it was trained on. Check "
            "both"
        )
