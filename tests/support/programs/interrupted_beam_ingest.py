"""Ingest the folder `sys.argv[1]` into `sys.argv[2]` with Apache Beam and `interrupted_worker`, a file a part."""

import sys

from apache_beam.options.pipeline_options import PipelineOptions

from dit_video.data.ingest import parts, workers
from dit_video.data.ingest.clusters import make_beam
from dit_video.data.ingest.engine import ingest

workers.MODULE = "interrupted_worker"
parts._MIN_PART_BYTES = 1
ingest(sys.argv[1], sys.argv[2], run_parts=make_beam(options=PipelineOptions([])))
