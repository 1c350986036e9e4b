"""Run `tools/ingest.py` with these arguments, from and to the shared bucket, with parts of a file each."""

import runpy
from pathlib import Path

from dit_video.data.ingest import parts, workers
from support import shared_bucket

shared_bucket.register()
parts._MIN_PART_BYTES = 1
workers.MODULE = "bucket_worker"
runpy.run_path(str(Path(__file__).parents[3] / "tools" / "ingest.py"), run_name="__main__")
