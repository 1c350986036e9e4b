"""Every way in which people hold clips, read as one `Listing`: (clips, unlisted, rejected, format).

| format | `source` | clips and captions |
|---|---|---|
| `folder` | a folder, with subfolders | all videos and images, with the captions in files beside them: `clip.txt`, `clip.caption` (all of the file is one caption) or `clip.json` (`text`, `caption`, `captions`: a string or a list) |
| | with `metadata.csv` or `.jsonl` | the clips that it names, `file_name,text`; a clip that is named again has another caption; in JSON `text` may be a list |
| `table` | a `.csv` or `.jsonl` | the same, with paths that are absolute or relative to the list; `path,text` as Open-Sora writes it is understood everywhere |
| `webdataset` | a `.tar`, or a folder of them | members with one key: media beside `.txt`, `.caption` or `.json`; read in place, so not compressed |
| `ucf101` | a folder with `UCF-101/` and `ucfTrainTestlist/` | train and test by list 1, 2 or 3; "ApplyEyeMakeup" is captioned "apply eye makeup" |
| `msrvtt` | a folder with the videos and `*videodatainfo.json` or `MSRVTT_data.json` | all sentences of a clip; train, validation and test |

Every caption is stripped; empty ones and repetitions are dropped; one over 64 KiB, or not UTF-8, sets its clip aside. Names that
begin with a dot are hidden. Links are followed, in folders; in tars they are rejected. A file that a list names and nobody has, and
a row or entry of a list that is not well formed, is in `rejected`, with its line and reason, and the rest goes on. An error is only
what makes a source unusable as a whole: a list without the columns that it must have, annotations that are no JSON, no clip at all.
"""  # noqa: E501

from dit_video.data.ingest.formats.detect import list_clips
from dit_video.data.ingest.formats.listed import IMAGES, MEDIA, VIDEOS, Format, Listed, Listing

__all__ = ["IMAGES", "MEDIA", "VIDEOS", "Format", "Listed", "Listing", "list_clips"]
