"""Train, evaluate and sample video diffusion transformers, from raw clips to finished videos."""

import importlib
from typing import TYPE_CHECKING, Any

from dit_video.core.platform.tpu import skip_missing_tpu
from dit_video.core.platform.xla_flags import set_cpu_flags
from dit_video.core.version import __version__

if TYPE_CHECKING:
    from dit_video.loading import load
    from dit_video.sampling.pipeline import Pipeline, Request
    from dit_video.video import Clip

__all__ = ["Clip", "Pipeline", "Request", "__version__", "load"]

skip_missing_tpu()
set_cpu_flags()

_LAZY = {
    "Clip": "dit_video.video",
    "Pipeline": "dit_video.sampling.pipeline",
    "Request": "dit_video.sampling.pipeline",
    "load": "dit_video.loading",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import dit_video` alone loads neither JAX nor a decoder."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
