"""A source of clips becomes a data set: listing, screening, engine."""

from dit_video.data.ingest.engine import REPORT, IngestReport, ingest
from dit_video.data.ingest.listing import MEDIA, Listed, list_clips

__all__ = ["MEDIA", "REPORT", "IngestReport", "Listed", "ingest", "list_clips"]
