"""Count of the programs that JAX compiled in this process."""

import jax

_compiled: list[str] = []


def _record(name: str, _: float, **__: object) -> None:
    if name == "/jax/core/compile/backend_compile_duration":
        _compiled.append(name)


jax.monitoring.register_event_duration_secs_listener(_record)


def count_compilations() -> int:
    """Return the number of programs compiled since this module was imported, those in the cache on disk included."""
    return len(_compiled)
