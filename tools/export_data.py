"""Export a data set to the formats of other projects."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import script
from dit_video.curation.export import ExportContents, export_clips
from dit_video.curation.export.stored_clips import open_clips


def main(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")],
    to: Literal["videofolder", "webdataset", "csv"] = "videofolder",
    where: str = "",
    splits: tuple[str, ...] = (),
    captions: tuple[str, ...] = (),
    vectors: tuple[str, ...] = (),
    title: str | None = None,
    license: str = "unknown",
) -> None:
    """Export a data set to the formats of other projects, with a data card and a description in Croissant.

    For example:

        python tools/export_data.py data published --license cc-by-4.0
        python tools/export_data.py data tars --to webdataset --where "motion > 5" --splits train validation

    Args:
        data: Folder or address of a data set.
        destination: Folder to write.
        to: Format: Hugging Face's VideoFolder, WebDataset, or a CSV file beside the clips.
        where: Condition that the clips meet.
        splits: Splits that are exported; all by default.
        captions: Columns of captions; by default captions and all columns of texts named captions_*.
        vectors: Columns of vectors and bytes that are written too, such as embedding; none by default.
        title: Name of the data set in its card; the folder's by default.
        license: License of the clips in the card, such as cc-by-4.0.
    """
    name = title or data.rstrip("/").rpartition("/")[2] or data
    contents = ExportContents.select(
        open_clips(data), title=name, license=license, where=where, splits=splits, captions=captions, vectors=vectors
    )
    export_clips(contents, destination, to)
    total = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    print(f"{destination}: {len(contents)} clips, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
