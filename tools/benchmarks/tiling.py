"""What blended tiles change of the frames that a trained autoencoder decodes, by their overlap."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import dit_video
from benchmarks.data import clips_of
from dit_video.autoencoders import Tiles, tiling_error
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import ingest
from dit_video.data.sizes import SizeLimits, fit, read_fitted
from dit_video.encoders.autoencoder import Codec
from dit_video.experiment.run import Run
from dit_video.tokens import Grid

_TILE = 8
"""Latent positions of a tile's side."""
_OVERLAPS = (0, 1, 2, 3)
"""Latent positions."""
_CHUNKS = 4
"""Latent frames after a clip's first."""
_PIXELS = 192 * 256
_RENDERED = 4
"""Clips, where none are given."""


def measure(run: Path, clips: Path | None) -> dict[str, Any]:
    """Largest and mean difference of tiled frames from whole ones, in steps of 0..255, over all clips.

    Clips are taken from their start, at the largest size of at most 192×256 pixels that keeps their shape.

    Args:
      run: a run's folder, or a pipeline's.
      clips: a folder of clips; rendered ones if None.
    """
    alone = (run / "autoencoder" / "weights.safetensors").is_file()  # of a run, whether the denoiser is trained or not
    codec = Run.open(run).codec() if alone else dit_video.load(run).codec
    stride = codec.config.stride
    limits = SizeLimits(
        max_pixels=_PIXELS, max_frames=1 + _CHUNKS * stride.t, multiple=Grid(stride.t, stride.h, stride.w)
    )
    with clips_of(clips, _RENDERED) as folder, tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as made:
        ingest(folder, Path(made) / "data")
        source = ClipSource(Path(made) / "data")
        latents = [codec.encode(read_fitted(source, index, limits))[None] for index in range(len(source))]
        sizes = {fit(info, limits)[1:] for info in source.infos}
    return {
        "run": run.name,
        "clips": len(latents),
        "sizes": sorted(f"{height}x{width}" for height, width in sizes),
        "tile": f"{_TILE * stride.h}x{_TILE * stride.w}",
        "overlaps": {str(overlap * stride.h): _errors(codec, latents, overlap) for overlap in _OVERLAPS},
    }


def _errors(codec: Codec, latents: list[np.ndarray], overlap: int) -> dict[str, float]:
    stride = codec.config.stride
    tiles = Tiles(height=_TILE * stride.h, width=_TILE * stride.w, overlap=overlap * stride.h)
    found = [tiling_error(codec.config, codec.params, values, tiles) for values in latents]
    steps = 127.5  # of 0..255, in a pixel's unit of [-1, 1]
    return {
        "largest": round(steps * max(error.largest for error in found), 1),
        "mean": round(steps * float(np.mean([error.mean for error in found])), 4),
    }
