"""Folders of clips and lists, for tests."""

from pathlib import Path

from dit_video.data.ingest.formats import Listing

LATIN = "été".encode("latin-1")
"""Text that is not UTF-8."""


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write files into a folder, and return the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def get_captions(listing: Listing) -> dict[str, tuple[str, ...]]:
    """Return the captions of each clip, in the listing's order."""
    return {clip.name: clip.captions for clip in listing.clips}
