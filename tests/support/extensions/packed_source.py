"""A source of clips of another package: one file with all clips, and an index of where each lies."""

import json

from dit_video.data.ingest.formats import ListedClip, Listing, SourceFormat, register_format

INDEX, CLIPS = "clips.index.json", "clips.bin"


def find_index(folder):
    return [name for name in folder.files if name == INDEX]


def list_packed(folder, options):
    entries = json.loads((folder.source / INDEX).read_text())
    path = str(folder.source / CLIPS)
    clips = [ListedClip(name, tuple(texts), size, path, offset) for name, texts, offset, size in entries]
    return Listing(tuple(clips), format="packed")


register_format(SourceFormat(name="packed", find_marks=find_index, list_folder=list_packed))


def write_packed(destination, clips):
    """Write clips (name, caption, bytes) as a source of this format."""
    entries = []
    destination.mkdir()
    with open(destination / CLIPS, "wb") as file:
        for name, caption, encoded in clips:
            entries.append((name, [caption], file.tell(), len(encoded)))
            file.write(encoded)
    (destination / INDEX).write_text(json.dumps(entries))
