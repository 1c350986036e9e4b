"""Clips of any length and size through an autoencoder: a chunk of frames and a tile of the picture at a time.

A causal autoencoder's chunks equal the whole clip's, as what its layers keep goes from chunk to chunk, so memory does
not grow with a clip's length. At most two programs are compiled for any length: a clip's first chunk, and those that
follow. The last one is filled up with its own last frame, whose output is cut off.

Tiles do differ from the whole picture, near their borders; see `Tiles`. Height shared by several devices does not:
given a sharding of the height, XLA exchanges the rows at the devices' borders before every convolution, and attention
within a frame gathers it.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8

from dit_video.autoencoders.interface import AutoencoderConfig, latent_grid
from dit_video.autoencoders.tiling import Tile, Tiles, cut, weights
from dit_video.core.errors import UserError
from dit_video.nn import Memory, graph_of
from dit_video.tokens import Grid

Layout = jax.sharding.Sharding | None


def decode_stream(
    config: AutoencoderConfig,
    params: dict[str, Any],
    latents: Float[np.ndarray, "B t h w c"],
    *,
    chunk: int = 1,
    tiles: Tiles | None = None,
    sharding: Layout = None,
) -> Iterator[UInt8[np.ndarray, "B _ H W 3"]]:
    """The frames of latents, some at a time.

    Args:
      config: of a causal autoencoder.
      params: its parameters.
      latents: normalised.
      chunk: latent frames that are decoded at once.
      tiles: into which a picture is cut that does not fit; None decodes it whole.
      sharding: of a chunk's latents over devices, such as `NamedSharding(mesh, P(None, None, "context"))` for height.

    Raises:
      UserError: latents of another number of channels, a chunk of no frames, tiles that do not fit the stride, or a
        height that the devices do not divide.
    """
    if latents.ndim != 5 or latents.shape[-1] != config.channels:
        raise UserError(
            f"latents are [B t h w {config.channels}] for this autoencoder, {list(latents.shape)} were given"
        )
    _check(chunk, sharding, latents.shape[2], "latent rows")
    plan = cut(latents.shape[2], latents.shape[3], tiles, config.stride)
    parts = (latents[:, start : start + chunk] for start in range(0, latents.shape[1], chunk))
    for coded, count, begins in _coded(config, params, parts, plan, "decode", chunk, sharding):
        frames = count * config.stride.t - (config.stride.t - 1 if begins else 0)
        yield np.asarray(coded)[:, :frames]


def encode_stream(
    config: AutoencoderConfig,
    params: dict[str, Any],
    frames: Iterable[UInt8[np.ndarray, "B _ H W 3"] | Float32[np.ndarray, "B _ H W 3"]],
    *,
    chunk: int = 1,
    tiles: Tiles | None = None,
    sharding: Layout = None,
) -> Iterator[Float32[np.ndarray, "B _ h w c"]]:
    """The normalised latents of frames that come some at a time, in any portions.

    Args:
      config: of a causal autoencoder.
      params: its parameters.
      frames: 1 + k * temporal stride of them in all, in 0..255.
      chunk: latent frames that are made at once.
      tiles: into which a picture is cut that does not fit; None encodes it whole.
      sharding: of a chunk's frames over devices.

    Raises:
      UserError: frames that are not [B T H W 3] in 0..255, a chunk of no frames, tiles or frames that do not fit the
        stride (their number when they end), or a height that the devices do not divide.
    """
    stride = config.stride
    portions = _regrouped(frames, stride, chunk)
    first = next(portions, None)
    if first is None:
        raise UserError("there are no frames to encode; give at least one")
    _check(chunk, sharding, first.shape[2], "rows of pixels")
    grid = latent_grid(Grid(1, *first.shape[2:4]), stride)
    plan = cut(grid.h, grid.w, tiles, stride)

    def parts() -> Iterator[np.ndarray]:
        yield first
        yield from portions

    for coded, count, begins in _coded(config, params, parts(), plan, "encode", chunk, sharding):
        yield np.asarray(coded)[:, : 1 + (count - 1) // stride.t if begins else count // stride.t]


class TilingError(NamedTuple):
    """How far tiled pixels are from whole ones, in [-1, 1]."""

    largest: float
    mean: float


def tiling_error(
    config: AutoencoderConfig, params: dict[str, Any], latents: Float[np.ndarray, "B t h w c"], tiles: Tiles
) -> TilingError:
    """What tiles change of decoded frames, in steps of 1/127.5 as frames are uint8."""
    pairs = zip(
        decode_stream(config, params, latents), decode_stream(config, params, latents, tiles=tiles), strict=True
    )
    errors = [np.abs(whole.astype(np.float32) - tiled) / 127.5 for whole, tiled in pairs]
    return TilingError(max(float(error.max()) for error in errors), float(np.mean([error.mean() for error in errors])))


def _check(chunk: int, sharding: Layout, rows: int, what: str) -> None:
    if chunk < 1:
        raise UserError(f"chunk={chunk} must be at least 1 latent frame")
    if isinstance(sharding, jax.sharding.NamedSharding) and len(sharding.spec) > 2 and sharding.spec[2] is not None:
        axes = sharding.spec[2] if isinstance(sharding.spec[2], tuple) else (sharding.spec[2],)
        devices = int(np.prod([sharding.mesh.shape[axis] for axis in axes]))
        if rows % devices:
            raise UserError(f"{rows} {what} are not divisible by the {devices} devices that share them")


def _are_pixels(frames: np.ndarray) -> bool:
    if frames.ndim != 5 or frames.shape[-1] != 3:
        return False
    if frames.dtype == np.uint8:
        return True
    return frames.dtype == np.float32 and bool((frames >= 0).all() and (frames <= 255).all())  # NaN is neither


def _regrouped(
    frames: Iterable[UInt8[np.ndarray, "B _ H W 3"] | Float32[np.ndarray, "B _ H W 3"]], stride: Grid, chunk: int
) -> Iterator[UInt8[np.ndarray, "B _ H W 3"] | Float32[np.ndarray, "B _ H W 3"]]:
    """Portions of 1 + (chunk - 1) * stride frames first, then of chunk * stride; the last one may be shorter.

    Raises:
      UserError: something else than such frames, or in all not 1 + k * stride of them.
    """
    held: list[np.ndarray] = []
    wanted, total = 1 + (chunk - 1) * stride.t, 0
    for portion in frames:
        if not _are_pixels(portion):
            raise UserError(
                "frames are [B T H W 3] in 0..255, uint8 or float32, "
                f"{portion.dtype} {list(portion.shape)} were given; "
                "see dit_video.core.pixels.to_uint8"
            )
        held.append(portion)
        total += portion.shape[1]
        while sum(part.shape[1] for part in held) >= wanted:
            joined = held[0] if len(held) == 1 else np.concatenate(held, axis=1)
            yield joined[:, :wanted]
            held, wanted = [joined[:, wanted:]], chunk * stride.t
    if total:
        latent_grid(Grid(total, *held[0].shape[2:4]), stride)
    rest = np.concatenate(held, axis=1) if held else None
    if rest is not None and rest.shape[1]:
        yield rest


def _coded(
    config: AutoencoderConfig,
    params: dict[str, Any],
    parts: Iterable[np.ndarray],
    plan: list[Tile],
    method: str,
    chunk: int,
    sharding: Layout,
) -> Iterator[tuple[Array, int, bool]]:
    """Each part coded (with what fills it up), its own length, and whether it is the first.

    A part is computed while the one before is taken away.
    """
    stride = config.stride
    # A position of what goes in, and of what comes out, in latent positions.
    source, target = ((1, 1), (stride.h, stride.w)) if method == "decode" else ((stride.h, stride.w), (1, 1))
    run = _program(config, method)
    past: list[tuple[Array, ...] | None] = [None] * len(plan)
    shares = [jnp.asarray(weights(plan, tile, target)) for tile in plan]
    height = target[0] * max(tile.row + tile.height for tile in plan)
    width = target[1] * max(tile.column + tile.width for tile in plan)
    before: tuple[Array, int, bool] | None = None
    for part in parts:
        begins = past[0] is None
        full = chunk if method == "decode" else chunk * stride.t - (stride.t - 1 if begins else 0)
        filled = np.concatenate([part, *[part[:, -1:]] * (full - part.shape[1])], axis=1)
        blended = None
        for number, tile in enumerate(plan):
            piece = _window(filled, tile, source)
            placed = jax.device_put(piece, sharding) if sharding is not None else piece
            coded, past[number] = run(params, placed, past[number])
            if len(plan) == 1:
                blended = coded
                continue
            if blended is None:
                blended = jnp.zeros((*coded.shape[:2], height, width, coded.shape[-1]))
            corner = jnp.asarray([tile.row * target[0], tile.column * target[1]])
            blended = _laid(blended, coded, shares[number], corner)
        assert blended is not None
        finished = _to_uint8(blended) if method == "decode" else blended
        if before is not None:
            yield before
        before = finished, part.shape[1], begins
    if before is not None:
        yield before


def _window(values: np.ndarray, tile: Tile, scale: tuple[int, int]) -> np.ndarray:
    rows = slice(tile.row * scale[0], (tile.row + tile.height) * scale[0])
    columns = slice(tile.column * scale[1], (tile.column + tile.width) * scale[1])
    return values[:, :, rows, columns]


@functools.lru_cache(maxsize=16)
def _program(config: AutoencoderConfig, method: str):
    """A jitted method of the autoencoder on one chunk: its output, and what it keeps for the next."""
    graph = graph_of(config.make)

    @functools.partial(jax.jit, donate_argnums=2)
    def run(params, values, past):
        memory = Memory(past)
        model = nnx.merge(graph, params)
        if method == "decode":
            return model.decode(values, memory=memory), memory.kept
        return model.encode(values.astype(jnp.float32) * (2 / 255) - 1, memory=memory), memory.kept

    return run


@functools.partial(jax.jit, donate_argnums=0)
def _laid(canvas: Array, piece: Array, share: Array, corner: Array) -> Array:
    """A tile's weighted part added to the picture."""
    zero = jnp.zeros((), corner.dtype)
    place = (zero, zero, corner[0], corner[1], zero)
    under = jax.lax.dynamic_slice(canvas, place, piece.shape)
    return jax.lax.dynamic_update_slice(canvas, under + piece * share[..., None], place)


@jax.jit
def _to_uint8(pixels: Float[Array, "B T H W 3"]) -> UInt8[Array, "B T H W 3"]:
    return jnp.clip(jnp.rint((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)
