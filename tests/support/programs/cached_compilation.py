"""Compile a function with the compilation cache; print the folder of the cache and the number of hits."""

import jax

from dit_video.platform import compilation_cache

compilation_cache.MIN_COMPILE_SECONDS = 0.0
folder = compilation_cache.enable_compilation_cache()
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x * 2 + 1)(1.0)
print(folder, sum(name.endswith("/cache_hits") for name in events))
