"""Ingest the folder `sys.argv[1]` into `sys.argv[2]` with Apache Beam and `interrupted_worker`."""

import sys

from apache_beam.options.pipeline_options import PipelineOptions

from dit_video.data.ingest import workers
from dit_video.data.ingest.engine import ingest
from dit_video.data.records.cluster import BeamOptions

workers.MODULE = "interrupted_worker"
ingest(sys.argv[1], sys.argv[2], beam=BeamOptions(options=PipelineOptions([])))
