"""Errors of latents as they are stored, and of the clips that are decoded from them, by the type of storage."""

import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.tiling import list_stored_clips, open_codec
from dit_video.data.latents.cache import LatentExample, LatentSource, StorageDtype
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.latents.writer import write_latents
from dit_video.data.tables import Table
from dit_video.evaluation.metrics.reconstruction import psnr
from dit_video.video import Clip


def measure(run: Path, clips: Path | None) -> dict[str, Any]:
    """Measure what a type of storage costs in bytes and in quality, against latents that are not stored.

    `relative_error` is the root of the mean square of a latent's error over its values'; `psnr` compares the
    decoded frames with the clip, and `psnr_to_exact` with frames that are decoded from the exact latents.

    Args:
      run: Folder of a run or of a pipeline.
      clips: Folder of clips; rendered ones if None.
    """
    codec = open_codec(run)
    originals = list_stored_clips(codec, clips)
    latents = [codec.encode(clip) for clip in originals]
    exact = [codec.decode(values, fps=clip.fps) for values, clip in zip(latents, originals, strict=True)]
    figures = {dtype: _measure_dtype(codec, dtype, originals, latents, exact) for dtype in get_args(StorageDtype)}
    return {"run": run.name, "clips": len(latents), "psnr of exact latents": _compare(originals, exact), **figures}


def _measure_dtype(
    codec: LatentCodec, dtype: StorageDtype, originals: list[Clip], latents: list[np.ndarray], exact: list[Clip]
) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as temporary:
        folder = Path(temporary) / "latents"
        examples = (LatentExample(str(number), "", values) for number, values in enumerate(latents))
        write_latents(folder, examples, identity="benchmark", dtype=dtype)
        size = int(Table(folder, kind="latents")["length"].sum())
        source = LatentSource(folder)
        stored = [source[index] for index in range(len(source))]
    pairs = zip(stored, latents, strict=True)
    errors = [np.square(own - values).mean() / np.square(values).mean() for own, values in pairs]
    decoded = [codec.decode(values, fps=clip.fps) for values, clip in zip(stored, originals, strict=True)]
    return {
        "bytes_per_clip": size // len(latents),
        "relative_error": float(f"{np.sqrt(np.mean(errors)):.2g}"),
        "psnr": _compare(originals, decoded),
        "psnr_to_exact": _compare(exact, decoded),
    }


def _compare(clips: list[Clip], others: list[Clip]) -> float:
    values = [psnr(clip.frames, other.frames) for clip, other in zip(clips, others, strict=True)]
    return round(float(np.mean(np.minimum(values, 99))), 2)
