"""Export the pipeline of a run, for sharing."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path
from typing import Annotated, Literal

import tyro

import dit_video
from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import script


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")],
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ema: float | None = None,
    sigma_rel: float | None = None,
) -> None:
    """Export the pipeline of a run, for sharing.

    For example:

        python tools/export.py runs/quickstart experiments/pretrained/shapes
        python tools/export.py runs/mine shared/mine --dtype float32 --ema 0.999

    Args:
        run: Folder of a run or of a pipeline.
        destination: Folder of the pipeline to write.
        dtype: Data type of the written weights.
        ema: Decay of the weight average to load from a run; 0 loads the raw weights.
        sigma_rel: Relative width of a post-hoc average, reconstructed from the snapshots of a run.
    """
    dit_video.load(run, ema=ema, sigma_rel=sigma_rel).save(destination, dtype=dtype)
    total = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    print(f"{destination}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
