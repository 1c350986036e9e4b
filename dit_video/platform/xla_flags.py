"""XLA flags, set before JAX first computes."""

import os
from importlib.metadata import version

_FLAG = "xla_cpu_experimental_ynn_fusion_type"


def set_xla_flags() -> None:
    """Let CPUs compute 2-D convolutions by Eigen with jaxlib 0.10.2, which would use YNNPACK.

    That is 1.4 to 2.2 times as fast: in billions of operations a second on two cores 129 against 58 (17 frames of
    128x128, 32 channels), 175 against 106 (64x64, 64 channels), 179 against 95 (128x128, 96 channels). Matrix products
    stay with YNNPACK, which is as fast.

    A choice in `XLA_FLAGS` stays. Other releases are left alone: 0.10.0 and 0.10.1 use Eigen by default, and XLA ends a
    process that is given an unknown flag.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags and version("jaxlib") == "0.10.2":
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION".strip()
