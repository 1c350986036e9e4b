"""Formats of exports by name: a file for each, and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dit_video.curation.export.contents import ExportContents, WrittenFiles
from dit_video.curation.export.csv_table import write_csv_table
from dit_video.curation.export.video_folder import write_video_folder
from dit_video.curation.export.web_dataset import write_web_dataset


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A format of data sets."""

    title: str
    """Name as people write it."""
    write: Callable[[ExportContents, Path], WrittenFiles]
    """Function that writes the clips into an empty folder."""
    texts: tuple[str, ...]
    """Names of the columns of captions in its lists."""


EXPORT_FORMATS: dict[str, ExportFormat] = {
    "videofolder": ExportFormat(title="VideoFolder", write=write_video_folder, texts=("text", "captions")),
    "webdataset": ExportFormat(title="WebDataset", write=write_web_dataset, texts=("captions",)),
    "csv": ExportFormat(title="CSV", write=write_csv_table, texts=("text",)),
}
