"""The main job on the device: a training from clips to samples by `quickstart.py --brief`, and the shipped model.

Unlike the other parts, both need the packages that `dit_video` is installed with, such as PyAV, grain and tyro.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dit_video
from benchmarks.gpu.figures import DETAILS, Case, Figure
from benchmarks.timer import TimeBudget
from dit_video.core.errors import UserError

_ROOT = Path(__file__).resolve().parents[3]
_PROMPTS = ("a red circle moving left", "a blue square moving up")
_SIZE = (17, 32, 48)
MIN_PSNR = 30.0
"""Smallest PSNR of a clip of this device and of a CPU that is aimed for: products of float32 are rounded otherwise."""
_FIGURES = (
    Figure(name="quickstart.py --brief, from clips to its report", unit="s"),
    Figure(name="clips of the shipped model: PSNR against a CPU's", unit="dB", target=f">= {MIN_PSNR:g}"),
    Figure(name="clips of the shipped model: seconds a clip", unit="s"),
)


def list_cases() -> list[Case]:
    """Return the cases of the training and of the clips."""
    return [
        Case(name="clips of the shipped model", figures=_FIGURES[1:], measure=_compare),
        Case(name="quickstart", figures=_FIGURES[:1], measure=_train),
    ]


def _train(budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the seconds of the quickstart."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        _run([_ROOT / "experiments" / "quickstart.py", "--brief", "--workdir", folder], budget)
        seconds = time.perf_counter() - start
    yield _FIGURES[0].name, seconds


def _compare(budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield what the clips of the shipped model have in common with a CPU's, and their seconds once compiled."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clips.npy"
        _run(["-c", f"from {__name__} import save_clips; save_clips({str(file)!r})"], budget, cpu=True)
        expected = np.load(file)
    sample_clips()
    start = time.perf_counter()
    found = sample_clips()
    yield _FIGURES[2].name, (time.perf_counter() - start) / len(_PROMPTS)
    errors = np.square(found.astype(np.float32) - expected).mean(axis=(1, 2, 3, 4))
    yield DETAILS, {"mean squared errors": errors.tolist(), "devices": [str(jax.devices()[0]), "cpu"]}
    yield _FIGURES[1].name, float(10 * np.log10(255**2 / max(float(errors.max(axis=0)), 1e-3)))


def save_clips(file: str) -> None:
    """Write the clips of this process's device to a file."""
    np.save(file, sample_clips())


def sample_clips() -> np.ndarray:
    """Return the frames of a clip for each prompt."""
    pipeline = _open()
    clips = [pipeline.generate(prompt, size=_SIZE, seed=seed) for seed, prompt in enumerate(_PROMPTS)]
    return np.stack([clip.frames for clip in clips])


@functools.cache
def _open() -> "dit_video.Pipeline":
    return dit_video.load(_ROOT / "experiments" / "pretrained" / "shapes")


def _run(arguments: list[Any], budget: TimeBudget, *, cpu: bool = False) -> None:
    """Run Python in a process of its own.

    Raises:
      UserError: If it fails, with the last line that it prints, or if the budget is spent.
    """
    paths = [str(_ROOT), str(_ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if cpu:
        environment["JAX_PLATFORMS"] = "cpu"
    try:
        ended = subprocess.run(
            [sys.executable, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            timeout=budget.remaining,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError("the time was spent") from error
    if ended.returncode:
        last = (ended.stdout.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{Path(str(arguments[0])).name} ended with exit code {ended.returncode}: {last}")
