"""Folders of clips and lists, as tests write and read them."""

from pathlib import Path

from dit_video.data.ingest import Listing

LATIN = "été".encode("latin-1")
"""is not UTF-8"""


def fill(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(listing: Listing) -> dict[str, tuple[str, ...]]:
    """By name; in the listing's order, as a dict keeps it."""
    return {clip.name: clip.captions for clip in listing.clips}
