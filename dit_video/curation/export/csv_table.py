"""A CSV file with a row for each clip, as Open-Sora's tools read it, beside the clips."""

import csv
import json
from pathlib import Path

from dit_video.curation.export.contents import ExportContents, PathRegister, WrittenFiles

TABLE = "metadata.csv"


def write_csv_table(contents: ExportContents, folder: Path) -> WrittenFiles:
    """Write the clips, and a table whose first columns are `path` and `text`; return the pattern of its file.

    The second and further captions of clips are in the columns `text_2`, `text_3`, ….

    Raises:
      UserError: two clips would have the same path.
    """
    count = (
        max(1, *(len(captions or ()) for captions in contents.read_column("captions")))
        if _has_captions(contents)
        else 1
    )
    texts = ["text", *(f"text_{number + 1}" for number in range(1, count))]
    register, names = PathRegister(), None
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for clip in contents:
            register.add(clip.path, clip.name)
            target = folder / clip.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(clip.content)
            if names is None:
                names = list(clip.values)
                writer.writerow(["path", *texts, *names])
            captions = [*clip.captions, *[""] * (count - len(clip.captions))]
            writer.writerow([clip.path, *captions, *(_format(clip.values[name]) for name in names)])
    return WrittenFiles({"train": [TABLE]})


def _has_captions(contents: ExportContents) -> bool:
    return "captions" in contents.clips.table.names


def _format(value) -> str | float | int | None:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
