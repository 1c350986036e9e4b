"""Fit the decoder of quick previews of a pipeline's autoencoder, and write it into the pipeline's folder."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.timer import time_median
from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.storage import to_storage_path
from dit_video.data.clips import ClipSource
from dit_video.data.latents.codec import LatentCodec
from dit_video.data.sizes import SizeLimits, read_fitted_clip
from dit_video.data.usable_clips import ClipRequirements, select_usable
from dit_video.evaluation.metrics.reconstruction import compute_limited_psnr
from dit_video.experiment.datasets import open_datasets
from dit_video.nn import get_param_shapes
from dit_video.sampling.pipeline_config import (
    AUTOENCODER,
    PREVIEW,
    PipelineConfig,
    is_pipeline_folder,
    read_pipeline_config,
)
from dit_video.sampling.preview import PreviewDecoder, fit_preview_decoder, load_preview_decoder
from dit_video.training.hooks.logging import Progress
from dit_video.video import Clip
from dit_video.weights import load as load_weights

_ROUNDS = 50


def main(
    pipeline: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PIPELINE")],
    data: str,
    clips: int = 256,
    held_out: int = 32,
) -> None:
    """Fit the decoder of quick previews of a pipeline's autoencoder, and write it into the pipeline's folder.

    For example:

        python tools/fit_preview_decoder.py runs/quickstart/pipeline --data runs/quickstart/data
        python tools/fit_preview_decoder.py shared/mine --data CLIPS --clips 64

    It is least squares in closed form, of the clips that the autoencoder decodes. PSNR is that of other clips, and the
    time that of a clip of the pipeline's own size.

    Args:
        pipeline: Folder of a pipeline; a finished run has RUN/pipeline.
        data: Data set written by tools/ingest.py: a folder, such as RUN/data, or an address (gs://…).
        clips: Maximum number of clips to fit to.
        held_out: Maximum number of other clips to measure on; at most half of all.
    """
    check_minimum(1, clips=clips, held_out=held_out)
    if not is_pipeline_folder(pipeline):
        raise UserError(f"{pipeline} is invalid: it is no folder of a pipeline. Use one, such as RUN/pipeline.")
    config = read_pipeline_config(pipeline)
    limits = SizeLimits(
        max_pixels=config.size.h * config.size.w,
        max_frames=config.size.t,
        multiple=config.model.autoencoder.stride,
        fps=config.fps,
    )
    source = _select_clips(data, limits)
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    measured = order[: min(held_out, len(source) // 2)]
    fitted = order[len(measured) :][:clips]
    codec = LatentCodec(
        config.model.autoencoder,
        load_weights(pipeline / AUTOENCODER, like=get_param_shapes(config.model.autoencoder.make)),
    )
    with Progress("fitting", len(fitted), unit="clip") as progress:

        def read_clips():
            for number, index in enumerate(fitted):
                yield read_fitted_clip(source, index, limits)
                progress.update(number + 1)

        fit_preview_decoder(codec, read_clips()).save(pipeline / PREVIEW)
    decoder = load_preview_decoder(pipeline / PREVIEW)  # as it is stored
    print(f"{pipeline / PREVIEW}: {(pipeline / PREVIEW).stat().st_size / 1000:.0f} kB, fitted to {len(fitted)} clips")
    _print_quality(codec, decoder, [read_fitted_clip(source, index, limits) for index in measured])
    _print_time(codec, decoder, config)


def _select_clips(data: str, limits: SizeLimits) -> ClipSource:
    selected = select_usable(open_datasets(to_storage_path(data)), ClipRequirements(limits=(limits,)))
    if selected.excluded:
        print(selected.describe())
    if len(selected.clips) < 2:
        raise UserError(f"--data {data} is invalid: it has {len(selected.clips)} usable clips. Use at least 2.")
    return selected.clips


def _print_quality(codec: LatentCodec, decoder: PreviewDecoder, clips: Sequence[Clip]) -> None:
    """Print the mean PSNR against what the autoencoder decodes, and against the clips."""
    to_decoded, to_clip = [], []
    for clip in clips:
        latents = codec.encode(clip)
        preview = decoder.decode(latents, fps=clip.fps).frames
        to_decoded.append(compute_limited_psnr(codec.decode(latents, fps=clip.fps).frames, preview))
        to_clip.append(compute_limited_psnr(clip.frames, preview))
    print(
        f"PSNR on {len(clips)} other clips: {np.mean(to_decoded):.1f} dB against the autoencoder's, "
        f"{np.mean(to_clip):.1f} dB against the clips"
    )


def _print_time(codec: LatentCodec, decoder: PreviewDecoder, config: PipelineConfig) -> None:
    """Print the median times of a clip of the pipeline's size, whose calls alternate."""
    shape = (*config.model.latent_grid(config.size), codec.config.channels)
    latents = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    calls = {
        "preview": lambda: decoder.decode(latents, fps=config.fps),
        "autoencoder": lambda: codec.decode(latents, fps=config.fps),
    }
    seconds = time_median(calls, _ROUNDS)
    size = "x".join(map(str, config.size))
    print(
        f"time of {size}: {seconds['preview'] * 1000:.2f} ms, the autoencoder's {seconds['autoencoder'] * 1000:.2f} ms:"
        f" {seconds['autoencoder'] / seconds['preview']:.1f} times as fast"
    )


if __name__ == "__main__":
    script(parse_arguments)(main)
