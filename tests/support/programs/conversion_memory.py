"""Print the memory that a conversion takes beyond that before it, in bytes.

The arguments are the folder to be converted, a small one that is converted first, the destination and the layout.
"""

import sys

from dit_video.families.convert import convert
from support.process_memory import read_memory, reset_peak_memory


def main() -> None:
    """Convert both folders."""
    source, small, destination, layout = sys.argv[1:]
    convert(small, small + " out", layout=layout)  # imports modules and traces functions
    reset_peak_memory()
    before = read_memory("VmRSS")
    convert(source, destination, layout=layout, shard_bytes=60_000_000)
    print(read_memory("VmHWM") - before)


if __name__ == "__main__":
    main()
