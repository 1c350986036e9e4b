"""Errors of tiled decoding with a trained autoencoder, by the overlap of the tiles."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import dit_video
from benchmarks.data import provide_clips
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.sizes import SizeLimits, read_fitted_clip
from dit_video.experiment.run import Run
from dit_video.models.autoencoders import Tiles, measure_tiling_error
from dit_video.tokens import Grid
from dit_video.video import Clip

_TILE_SIZE = 8
"""Side length of a tile, in latent positions."""
_OVERLAPS = (0, 1, 2, 3)
"""Overlaps of the tiles, in latent positions."""
_NUM_CHUNKS = 4
"""Number of latent frames after a clip's first."""
_MAX_PIXELS = 192 * 256
_NUM_RENDERED_CLIPS = 4
"""Number of rendered clips, if no folder of clips is set."""


def measure(run: Path, clips: Path | None) -> dict[str, Any]:
    """Measure the largest and mean difference of tiled decoding from decoding at once, in steps of 0..255.

    Clips are read from their start, at the largest size of at most 192×256 pixels with their aspect ratio.

    Args:
      run: Folder of a run or of a pipeline.
      clips: Folder of clips; rendered ones if None.
    """
    codec = open_codec(run)
    stride, fitted = codec.config.stride, list_stored_clips(codec, clips)
    latents = [codec.encode(clip)[None] for clip in fitted]
    sizes = {clip.frames.shape[1:3] for clip in fitted}
    return {
        "run": run.name,
        "clips": len(latents),
        "sizes": sorted(f"{height}x{width}" for height, width in sizes),
        "tile": f"{_TILE_SIZE * stride.h}x{_TILE_SIZE * stride.w}",
        "overlaps": {str(overlap * stride.h): _measure_errors(codec, latents, overlap) for overlap in _OVERLAPS},
    }


def open_codec(run: Path) -> LatentCodec:
    """Return the autoencoder of a run, even if its denoiser is not trained yet, or of a pipeline."""
    is_run = (run / "autoencoder" / "weights.safetensors").is_file()
    return Run.open(run).codec() if is_run else dit_video.load(run).codec


def list_stored_clips(codec: LatentCodec, clips: Path | None) -> list[Clip]:
    """Return clips from their start, at the largest size of at most 192×256 pixels; rendered ones if there are none."""
    stride = codec.config.stride
    limits = SizeLimits(
        max_pixels=_MAX_PIXELS, max_frames=1 + _NUM_CHUNKS * stride.t, multiple=Grid(stride.t, stride.h, stride.w)
    )
    with (
        provide_clips(clips, _NUM_RENDERED_CLIPS) as folder,
        tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as temporary,
    ):
        ingest(folder, Path(temporary) / "data")
        source = ClipSource(Path(temporary) / "data")
        return [read_fitted_clip(source, index, limits) for index in range(len(source))]


def _measure_errors(codec: LatentCodec, latents: list[np.ndarray], overlap: int) -> dict[str, float]:
    stride = codec.config.stride
    tiles = Tiles(height=_TILE_SIZE * stride.h, width=_TILE_SIZE * stride.w, overlap=overlap * stride.h)
    errors = [measure_tiling_error(codec.config, codec.params, values, tiles) for values in latents]
    steps = 127.5  # steps of 0..255 per unit of pixels in [-1, 1]
    return {
        "largest": round(steps * max(error.largest for error in errors), 1),
        "mean": round(steps * float(np.mean([error.mean for error in errors])), 4),
    }
