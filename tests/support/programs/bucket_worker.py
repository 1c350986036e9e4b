"""A worker that reads clips from the shared bucket."""

from dit_video.data.ingest import worker
from support import shared_bucket

shared_bucket.register()
worker.main()
