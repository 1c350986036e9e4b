"""Export of data sets: Hugging Face's VideoFolder, WebDataset and CSV, each with a data card and Croissant."""

from dit_video.curation.export.contents import ExportContents
from dit_video.curation.export.export import export_clips
from dit_video.curation.export.registry import EXPORT_FORMATS, ExportFormat
from dit_video.curation.export.stored_clips import StoredClips
