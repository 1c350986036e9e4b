"""Ingest of a source of clips into a data set: listing (its docstring has a table of formats), screening, engine."""

from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.formats import MEDIA, ListedClip, Listing, ListingFormat, list_clips
from dit_video.data.ingest.quality_filter import ScreeningConfig
from dit_video.data.ingest.reencoder import ReencodeConfig
from dit_video.data.ingest.report import REPORT, IngestReport

__all__ = [
    "MEDIA",
    "REPORT",
    "IngestConfig",
    "IngestReport",
    "ListedClip",
    "Listing",
    "ListingFormat",
    "ReencodeConfig",
    "ScreeningConfig",
    "ingest",
    "list_clips",
]
