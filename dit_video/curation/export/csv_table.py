"""A CSV file with a row for each clip and caption, as Open-Sora's tools read it, beside the clips."""

import csv
import json
from pathlib import Path

from dit_video.curation.export.contents import ExportContents, PathRegister, WrittenFiles

TABLE = "metadata.csv"


def write_csv_table(contents: ExportContents, folder: Path) -> WrittenFiles:
    """Write the clips, and a table whose first columns are `path` and `text`; return the pattern of its file.

    A clip has a row for each of its captions, and one if it has none.

    Raises:
      UserError: two clips would have the same path.
    """
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
                writer.writerow(["path", "text", *names])
            values = [_format(clip.values[name]) for name in names]
            writer.writerows([clip.path, text, *values] for text in clip.captions or ("",))
    return WrittenFiles({"train": [TABLE]})


def _format(value) -> str | float | int | None:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
