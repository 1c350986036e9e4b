"""XLA flags are set before JAX first computes."""

import os
import subprocess
import sys

import pytest

from dit_video.platform import xla_flags

FLAG = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize(
    ("before", "release", "after"),
    [
        ("", "0.10.2", f"{FLAG}-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"),
        ("--a=1", "0.10.2", f"--a=1 {FLAG}-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"),
        (f"{FLAG}mine", "0.10.2", f"{FLAG}mine"),
        ("--a=1", "0.11.0", "--a=1"),
    ],
)
def test_flags(monkeypatch, before, release, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(xla_flags, "version", lambda _: release)
    xla_flags.set_xla_flags()
    xla_flags.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == after


def test_this_release_takes_them():
    code = """
import dit_video, jax.numpy as jnp, jax
picture, kernel = jnp.ones((1, 8, 8, 16)), jnp.ones((3, 3, 16, 16))
convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
compiled = jax.jit(convolve).lower(picture, kernel).compile()
assert "ynn" not in compiled.as_text(), compiled.as_text()
assert float(compiled(picture, kernel)[0, 4, 4, 0]) == 144
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
