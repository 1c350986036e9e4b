"""Read every file of a folder in several ways; print its name and the outcomes, a line of JSON a file."""

import json
import sys
from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.tokens import Grid
from dit_video.video import decode, probe

READS = [
    probe,
    decode,
    lambda content: decode(content, fps=8, size=Grid(3, 16, 24)),
    lambda content: decode(content, fps=30.0),
    lambda content: decode(content, start=1.3, frames=2),
]


def get_outcome(read, content: bytes) -> str:
    """Return the type of the result, or of the error."""
    try:
        return type(read(content)).__name__
    except UserError as error:
        if "\n" in str(error):
            raise AssertionError("an error has more than one line") from error
        return type(error).__name__


for path in sorted(Path(sys.argv[1]).iterdir()):
    print(json.dumps([path.name, [get_outcome(read, path.read_bytes()) for read in READS]]), flush=True)
