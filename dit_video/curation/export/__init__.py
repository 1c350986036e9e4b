"""Export of data sets: Hugging Face's VideoFolder, WebDataset and CSV, each with a data card and Croissant."""

from dit_video.curation.export.contents import ExportContents
from dit_video.curation.export.formats import EXPORT_FORMATS, ExportFormat, export_clips
from dit_video.curation.export.stored_clips import StoredClips
