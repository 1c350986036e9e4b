"""Make a data set of a folder of clips.

    python tools/ingest.py CLIPS DESTINATION

CLIPS holds videos or images and a `metadata.csv` with the columns `file_name,text`; without that file the caption of
`clip.mp4` is read from `clip.txt`. Clips that can't be decoded are set aside and listed in DESTINATION/report.json.
"""

from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from dit_video.data.ingest import REPORT, ingest
from dit_video.errors import script

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CLIPS")]
Destination = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]


@script
def main(source: Source, destination: Destination) -> None:
    """Make a data set of a folder of clips.

    Args:
        source: the folder of clips
        destination: the folder to be made
    """
    with tqdm(desc="ingest", unit="clip") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = ingest(source, destination, progress=progress)
    print(f"{destination}: {report.usable} clips, {report.frames} frames" + (" (was there already)" * report.reused))
    if report.uncaptioned:
        print(f"{report.uncaptioned} without a caption: they train the unconditional model alone")
    if report.unlisted:
        shown = ", ".join(report.unlisted[:3]) + (", …" if len(report.unlisted) > 3 else "")
        print(f"{len(report.unlisted)} files that metadata.csv doesn't name were left out: {shown}")
    for name, reason in report.quarantined[:10]:
        print(f"set aside: {name}: {reason}")
    if len(report.quarantined) > 10:
        print(f"… {len(report.quarantined)} were set aside: see {destination / REPORT}")


if __name__ == "__main__":
    tyro.cli(main)
