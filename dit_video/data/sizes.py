"""Training sizes of clips, from their native sizes: never cropped in space, never enlarged."""

import functools
import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int32, Int64

from dit_video.core.errors import DecodeError, UserError, check_at_least
from dit_video.core.grid import map_grids
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.tokens import Grid
from dit_video.video import TOLERANCE, Clip, decode


@dataclass(frozen=True, kw_only=True)
class SizeLimits:
    """Limits of the sizes at which a model trains.

    Raises:
      UserError: If no size is within the limits.
    """

    max_pixels: int
    """Maximum number of pixels of a frame, height times width."""
    max_frames: int
    multiple: Grid
    """Step of sizes, the autoencoder's stride times the patch: lengths are 1 + k * multiple.t (a causal autoencoder
    encodes the first frame separately); heights and widths are multiples of multiple.h and multiple.w."""
    fps: float | None = None
    """Frame rate to which clips of a higher rate are resampled; None keeps every clip's own average rate."""

    def __post_init__(self):
        check_at_least(1, multiple=min(self.multiple), max_frames=self.max_frames)
        if self.fps is not None and not self.fps > 0:
            raise UserError(f"fps={self.fps} is invalid: it must be positive. Use None for every clip's own rate.")
        min_pixels = self.multiple.h * self.multiple.w
        if self.max_pixels < min_pixels:
            raise UserError(
                f"max_pixels={self.max_pixels} is invalid: it is less than one multiple of "
                f"{self.multiple.h}x{self.multiple.w}. Use at least {min_pixels}."
            )


def get_sampled_fps(info: ClipInfo, limits: SizeLimits) -> float:
    """Return the frame rate at which a clip is sampled: the limits' rate, or its own if lower (never doubled)."""
    return info.fps if limits.fps is None else min(info.fps, limits.fps)


def count_sampled_frames(info: ClipInfo, limits: SizeLimits) -> int:
    """Return the number of frames at the sampled rate: those displayed at 0, 1/fps, … up to the start of the last."""
    # The same tolerance as in `decode`, and 1e-6 for the rounding of the product.
    return 1 + math.floor((info.seconds + TOLERANCE) * get_sampled_fps(info, limits) + 1e-6)


def fit_size(info: ClipInfo, limits: SizeLimits) -> Grid:
    """Return the training size of a clip in frames and pixels: the largest one within the limits.

    The aspect ratio is kept to within half a multiple: one side follows from the other side and the ratio, by rounding.
    Frames beyond `max_frames` (rounded down to 1 + k * multiple.t) belong to further crops of the clip.

    Raises:
      UserError: If the clip is smaller than one multiple, or so narrow that no size within the limits keeps its aspect
        ratio.
    """
    if reason := explain_misfit(info, limits):
        raise UserError(
            f"{info.name} has {reason}. Remove the clip, use a smaller stride or patch, or raise max_pixels."
        )
    frame = _fit_frame(info.height, info.width, limits)
    assert frame is not None  # as there is no reason against it
    t = limits.multiple.t
    return Grid(1 + (min(count_sampled_frames(info, limits), limits.max_frames) - 1) // t * t, *frame)


def fit_sizes(source: ClipSource, limits: SizeLimits, *, allow_misfits: bool = False) -> Int32[np.ndarray, "N 3"]:
    """Return the training sizes of all clips, as `fit_size` does: a data set has few sizes of frames, fitted once each.

    Args:
      source: The clips.
      limits: Limits of the sizes.
      allow_misfits: True to return zeros for a clip that has no training size.

    Raises:
      UserError: If a clip has no training size.
    """
    frames, t = np.minimum(count_all_sampled_frames(source, limits), limits.max_frames), limits.multiple.t
    native = np.stack([np.ones_like(frames), source.column("height"), source.column("width")], axis=-1).astype(np.int64)
    sizes = map_grids(lambda size: Grid(1, *(_fit_frame(size.h, size.w, limits) or (0, 0))), native)
    if not allow_misfits and (misfits := np.flatnonzero(sizes[:, 1] == 0)).size:
        fit_size(source.infos[int(misfits[0])], limits)  # raises the error that names the clip
    sizes[:, 0] = np.where(sizes[:, 1] > 0, 1 + (frames - 1) // t * t, 0)
    return sizes


def compute_all_sampled_fps(source: ClipSource, limits: SizeLimits) -> Float64[np.ndarray, " N"]:
    """Return the frame rate at which each clip is sampled, see `get_sampled_fps`."""
    return np.minimum(source.column("fps"), np.inf if limits.fps is None else limits.fps, dtype=np.float64)


def count_all_sampled_frames(source: ClipSource, limits: SizeLimits) -> Int64[np.ndarray, " N"]:
    """Return the number of frames of each clip at its sampled rate, see `count_sampled_frames`."""
    seconds, fps = source.column("seconds").astype(np.float64), compute_all_sampled_fps(source, limits)
    return 1 + np.floor((seconds + TOLERANCE) * fps + 1e-6).astype(np.int64)


def hash_clips(source: ClipSource) -> str:
    """Return a hash of names, contents, sizes, rates and lengths of clips: of all that decoded frames depend on."""
    texts = (*source.column("name"), *source.list_contents())
    content = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass"))
    for name in ("height", "width", "frames", "fps", "seconds"):
        content.update(source.column(name).astype("<f8").tobytes())
    return content.hexdigest()


def explain_misfit(info: ClipInfo, limits: SizeLimits) -> str:
    """Return the reason why a clip has no training size; empty if it has one."""
    if _fit_frame(info.height, info.width, limits) is not None:
        return ""
    (_, h, w), pixels = limits.multiple, f"{info.height}x{info.width} pixels"
    if info.height < h or info.width < w:
        return f"{pixels}, less than one multiple of {h}x{w}"
    return f"{pixels}: no size of at most {limits.max_pixels} pixels in multiples of {h}x{w} keeps its aspect ratio"


@functools.lru_cache(maxsize=4096)  # a data set of millions of clips has a few thousand sizes of frames
def _fit_frame(height: int, width: int, limits: SizeLimits) -> tuple[int, int] | None:
    """Return the largest height and width within the limits that keep the aspect ratio; None if there are none."""
    _, h, w = limits.multiple
    if height < h or width < w:
        return None
    ratio, rows, columns = width / height, height // h, width // w
    candidates = {(row, _round_to_range(row * h * ratio / w, columns)) for row in range(1, rows + 1)}
    candidates |= {(_round_to_range(column * w / ratio / h, rows), column) for column in range(1, columns + 1)}
    sizes = [(row * h, column * w) for row, column in candidates if row * h * column * w <= limits.max_pixels]
    # One side differs by at most half a multiple from the value that follows from the other side.
    sizes = [(y, x) for y, x in sizes if abs(x - y * ratio) <= w / 2 or abs(y - x / ratio) <= h / 2]
    return max(
        sizes, default=None, key=lambda size: (size[0] * size[1], -abs(math.log(size[1] / size[0] / ratio)), size)
    )


def read_fitted_clip(source: ClipSource, index: int, limits: SizeLimits, *, start: int = 0) -> Clip:
    """Decode one clip of a source at its training size: `fit_size(...).t` frames from sampled frame `start` on.

    Frames are selected by timestamp: for each sampling time the frame displayed then, also for variable frame rates.

    Raises:
      UserError: If the clip has no training size, or too few frames after `start`.
      DecodeError: If its bytes are damaged.
    """
    info = source.infos[index]
    size, fps, total = fit_size(info, limits), get_sampled_fps(info, limits), count_sampled_frames(info, limits)
    if not 0 <= start <= total - size.t:
        raise UserError(
            f"start={start} is invalid: {info.name} has {total} frames at {fps:g} fps, and {size.t} are read. Use 0 to "
            f"{total - size.t}."
        )
    encoded = source[index]
    try:
        background = source.get_background(index, start)
        clip = decode(encoded, size=size, start=start / fps, fps=fps, background=background)
    except DecodeError:
        raise
    except UserError as error:  # the clip has fewer frames than at ingest
        raise DecodeError(str(error)) from error
    return replace(clip, caption=info.caption)


def _round_to_range(value: float, maximum: int) -> int:
    return min(max(1, math.floor(value + 0.5)), maximum)
