"""Compile a function with the compilation cache; print the folder of the cache and the number of hits.

The folder of a run may be an argument. `gs://` is a folder of this machine if `DIT_VIDEO_TEST_BUCKET` names one.
"""

import os
import sys

import jax

from dit_video.core.platform import compilation_cache

if "DIT_VIDEO_TEST_BUCKET" in os.environ:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from support import shared_bucket

    shared_bucket.register()
compilation_cache.MIN_COMPILE_SECONDS = 0.0
folder = compilation_cache.enable_compilation_cache(run_folder=sys.argv[1] if sys.argv[1:] else None)
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x * 2 + 1)(1.0)
print(folder, sum(name.endswith("/cache_hits") for name in events))
