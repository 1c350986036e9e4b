"""Write the pipeline of a run, in bfloat16 unless asked otherwise: what one shares.

python tools/export.py runs/quickstart experiments/pretrained/shapes
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

import dit_video
from dit_video.core.errors import script


def main(
    run: Annotated[Path, tyro.conf.Positional],
    destination: Annotated[Path, tyro.conf.Positional],
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ema: float | None = None,
    sigma_rel: float | None = None,
) -> None:
    """Export.

    Args:
        run: a run folder, or a pipeline folder.
        destination: the pipeline folder to be written.
        dtype: of the weights.
        ema: of a run: which of its averages, by its decay; 0 for the weights themselves.
        sigma_rel: of a run: the relative width of an average that is put together from its snapshots.
    """
    dit_video.load(run, ema=ema, sigma_rel=sigma_rel).save(destination, dtype=dtype)
    total = sum(path.stat().st_size for path in destination.iterdir())
    print(f"{destination}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    script(tyro.cli)(main)
