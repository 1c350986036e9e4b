"""A source of clips becomes a data set: listing (its formats are in a table there), screening, engine."""

from dit_video.data.ingest.engine import REPORT, IngestReport, ingest
from dit_video.data.ingest.listing import MEDIA, Format, Listed, Listing, list_clips

__all__ = ["MEDIA", "REPORT", "Format", "IngestReport", "Listed", "Listing", "ingest", "list_clips"]
