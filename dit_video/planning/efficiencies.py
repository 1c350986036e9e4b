"""Shares of the chips' peak rates that were reached, by chip and kind of work: published, or measured by calibration.

A kind of work without a published measurement is not in the table: nothing is guessed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.planning.hardware import CHIPS, Chip

PRODUCTS, MEMORY, COLLECTIVES = "products", "memory", "collectives"
"""Kinds of work besides attention, as keys of the tables: products of dense matrices, copies in the device's memory,
collectives."""


def name_attention_work(backend: str) -> str:
    """Return the kind of work of an attention backend, as a key of the tables."""
    return f"{backend} attention"


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """A share of a peak rate, and its source."""

    share: float
    """Executed operations, or bytes, per second, in units of the chip's peak."""
    source: str
    """Publication, or date and device of the measurement."""


@dataclass(frozen=True, kw_only=True)
class Efficiencies:
    """Efficiencies of a chip by kind of work."""

    by_work: Mapping[str, Efficiency] = field(default_factory=dict)

    def get_share(self, work: str) -> float | None:
        """Return the share of a kind of work; None if none is known."""
        return self.by_work[work].share if work in self.by_work else None

    def update(self, measured: "Efficiencies") -> "Efficiencies":
        """Return these efficiencies, with measured ones instead of published ones."""
        return Efficiencies(by_work={**self.by_work, **measured.by_work})


_MAXTEXT = (
    "a language model's whole training: github.com/AI-Hypercomputer/maxtext, src/maxtext/configs/tpu/{}/README.md"
)
_TIERS = "Llama 3.1 70B's training: github.com/AI-Hypercomputer/maxtext, docs/reference/models/tiering.md"
_MAMF = "largest products: github.com/stas00/ml-engineering, compute/accelerator, maximum achievable matmul FLOPS"
_RING = "ring all-reduce of 8 GPUs: github.com/stas00/ml-engineering, network/README.md"
_WAN = "rest of Wan 14B's step after its products: github.com/AI-Hypercomputer/maxdiffusion, README.md, v5p-8"
_FLASH = "heads of 128, 8k and 16k tokens: FlashAttention-3, arXiv 2407.08608, figures 5 and 6"

_PUBLISHED: tuple[tuple[str, str, float, str], ...] = (
    # TPUs: model FLOPs of trainings without attention of note; what is recomputed and communicated lowers them.
    ("v4", PRODUCTS, 0.567, _MAXTEXT.format("v4")),
    ("v5e", PRODUCTS, 0.669, _MAXTEXT.format("v5e")),
    ("v5p", PRODUCTS, 0.715, _MAXTEXT.format("v5p")),
    ("v6e", PRODUCTS, 0.503, _TIERS),
    # 36.008 s on four chips of 459 TFLOP/s, all recomputed. Products: 4/3 of 5,432 TFLOP, at the share above 5.5 s. The
    # other 30.5 s are attention: 5.5/3 of 14,141 TFLOP, two forward passes and a backward pass of 3.5 instead of 3.
    ("v5p", name_attention_work("splash"), 0.463, _WAN),
    ("a100", PRODUCTS, 0.869, _MAMF),
    ("h100", PRODUCTS, 0.803, _MAMF),
    ("h200", PRODUCTS, 0.803, _MAMF),
    ("b200", PRODUCTS, 0.776, _MAMF),
    # Forward 595 and backward 516 of 989 TFLOP/s, with 2 and 5 of 7 products. Without a kernel 139 and 181, with 2 and
    # 4 of 6 products, although the source counts 5 in the backward pass, too.
    ("h100", name_attention_work("cudnn"), 0.542, _FLASH),
    ("h200", name_attention_work("cudnn"), 0.542, f"H100: {_FLASH}"),
    ("h100", name_attention_work("dense"), 0.144, _FLASH),
    ("h200", name_attention_work("dense"), 0.144, f"H100: {_FLASH}"),
    ("a100", COLLECTIVES, 0.78, _RING),
    ("h100", COLLECTIVES, 0.82, f"H200, with the same NVLink: {_RING}"),
    ("h200", COLLECTIVES, 0.82, _RING),
    ("b200", COLLECTIVES, 0.76, _RING),
)
PUBLISHED_EFFICIENCIES = {
    name: Efficiencies(
        by_work={
            work: Efficiency(share=share, source=source) for chip, work, share, source in _PUBLISHED if chip == name
        }
    )
    for name in CHIPS
}
"""Efficiencies of each chip of the table that were published."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A chip and its measured efficiencies, as stored in a file."""

    chip: Chip
    measured: Efficiencies

    def write(self, folder: Path) -> Path:
        """Write the calibration into a folder, instead of an older one of the same chip, and return its file."""
        path = folder / f"{self.chip.name}.json"
        efficiencies = {
            work: {"share": each.share, "source": each.source} for work, each in self.measured.by_work.items()
        }
        document: dict[str, Any] = {"efficiencies": efficiencies}
        if self.chip.name not in CHIPS:
            names = ("name", "kind", "flops", "memory", "bandwidth", "link_bandwidth", "source")
            document["chip"] = {name: getattr(self.chip, name) for name in names}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
        return path


def get_calibration_folder() -> Path:
    """Return the default folder of calibrations: `dit_video/calibration` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit_video" / "calibration"


def read_calibration(folder: Path, name: str) -> Calibration | None:
    """Read the calibration of a chip, or of "cpu"; None if there is none.

    Raises:
      UserError: the file is not a calibration.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    try:
        document = read_json(path)
        chip = CHIPS[name] if name in CHIPS else Chip(**document["chip"])
        by_work = {
            work: Efficiency(share=float(each["share"]), source=str(each["source"]))
            for work, each in document["efficiencies"].items()
        }
        if any(not each.share > 0 for each in by_work.values()):
            raise ValueError("a share is not positive")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fix = "Remove it, or use tools/plan.py --calibrate to write it again"
        raise UserError(f"{path} is invalid: it must be a calibration ({error}). {fix}") from error
    return Calibration(chip=chip, measured=Efficiencies(by_work=by_work))


def find_efficiencies(chip: Chip, calibration: Calibration | None = None) -> Efficiencies:
    """Return the efficiencies of a chip: measured ones, and published ones where there are none."""
    published = PUBLISHED_EFFICIENCIES.get(chip.name, Efficiencies())
    return published if calibration is None else published.update(calibration.measured)
