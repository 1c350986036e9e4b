"""Ingest the folder `sys.argv[1]` into `sys.argv[2]` with `interrupted_worker`, in parts of a file each.

Its main part has no guard: workers do not run the script again.
"""

import sys

from dit_video.data.ingest import parts, workers
from dit_video.data.ingest.engine import ingest

if __name__ != "__main__":
    raise SystemExit("the script was run again by a worker")
workers.MODULE = "interrupted_worker"
parts._MIN_PART_BYTES = 1
ingest(sys.argv[1], sys.argv[2], workers=1)
