"""Reading of clips in all supported source formats as one `Listing`: (clips, unlisted, rejected, format).

| format | `source` | clips and captions |
|---|---|---|
| `folder` | a folder, with subfolders | all videos and images, with captions in files next to them, or in a folder `captions`: `clip.txt`, `clip.caption` (the whole file is one caption) or `clip.json` (`text`, `caption`, `captions`, `prompt`, `cap`: a string or a list) |
| | with `metadata.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` in any of its folders | the clips that the list names, `file_name,text`, relative to its folder; a clip that is named again has another caption; in JSON and Parquet `text` may be a list; for other columns see `lists` |
| | with `videos.txt` and `prompts.txt` | a path and a caption a line, as in finetrainers |
| | with one list of another name | the same as with `metadata.csv`; a name without a folder may be that of a file in any folder (OpenVid-1M) |
| `table` | a `.csv`, `.tsv`, `.jsonl`, `.json` or `.parquet` | the same, with paths that are absolute or relative to the list |
| `webdataset` | a `.tar`, or a folder of them | members that share a key: media next to `.txt`, `.caption` or `.json`; read in place, so tars must not be compressed |
| `ucf101` | a folder with `UCF-101/` and `ucfTrainTestlist/` | train and test clips of list 1, 2 or 3; "ApplyEyeMakeup" is captioned "apply eye makeup" |
| `msrvtt` | a folder with the videos and `*videodatainfo.json` or `MSRVTT_data.json` | all sentences of a clip; train, validation and test |

A clip is in the split that its source says, else in that of the first folder in its name (`train`, `val`, `test`, …), else in `train`.
Captions are stripped; empty ones and repetitions are dropped. A clip whose caption exceeds 64 KiB or is not UTF-8 is rejected.
Names that begin with a dot are ignored. Links are followed inside a folder; links out of it (unless `follow_links`) and those in
tars are rejected. A file that a list names but that does not exist, and a malformed row or entry of a list, are in `rejected`
with line and reason; listing continues with the rest. A source is on this machine or in a bucket (`gs://`, `s3://`, …), which
is listed by one request; tars and clips there are read in place.
An error is raised only if a source is unusable as a whole: a list lacks required columns, annotations are not JSON, or there is no clip.
"""  # noqa: E501

from dit_video.data.ingest.formats.detect import SourceFormat, list_clips, register_format
from dit_video.data.ingest.formats.listing import (
    MEDIA,
    ListColumns,
    ListedClip,
    Listing,
    ListingOptions,
    warn_of_losses,
)
