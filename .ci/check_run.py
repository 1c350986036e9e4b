"""Check that a run has learned and that its files can be decoded.

python .ci/check_run.py RUN
"""

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

from dit_video.training.hooks.logging import read_metrics
from dit_video.video import decode


def check_losses(run: Path) -> None:
    """Check that every logged loss fell, comparing the means of its first and last fifth."""
    logs = {
        path: [entry["loss"] for entry in read_metrics(path) if "loss" in entry]
        for path in sorted(run.rglob("metrics.jsonl"))
    }
    logs = {path: losses for path, losses in logs.items() if losses}
    assert logs, f"{run} has no metrics.jsonl with a loss"
    for path, losses in logs.items():
        assert len(losses) >= 2, f"{path} has {len(losses)} entries, which are too few to compare"
        assert all(math.isfinite(loss) for loss in losses), f"{path} has a loss that is not finite"
        fifth = max(1, len(losses) // 5)
        first, last = sum(losses[:fifth]) / fifth, sum(losses[-fifth:]) / fifth
        print(f"{path.relative_to(run)}: loss {first:.4g} -> {last:.4g} over {len(losses)} entries")
        assert last < first, f"the loss of {path} did not fall"


def check_samples(run: Path) -> None:
    """Check that every file in `prompts.json` decodes to the size given there, and that there are no other samples."""
    folder = run / "samples"
    samples = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    assert samples, f"{folder}/prompts.json is empty"
    for sample in samples:
        clip = decode(folder / sample["file"])
        expected = (sample["frames"], sample["height"], sample["width"], 3)
        assert clip.frames.shape == expected, f"{sample['file']} is {clip.frames.shape}, not {expected}"
        assert {"prompt", "seed"} <= sample.keys()
    files = {path.name for path in folder.iterdir()} - {"prompts.json", "settings.json"}
    assert files == {sample["file"] for sample in samples}, "the files in samples/ are not those of prompts.json"
    print(f"{len(samples)} samples decode")


def check_report(run: Path) -> None:
    json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    page = (run / "report.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert page.startswith("<!doctype html>")
    assert "http://" not in page
    assert "https://" not in page
    print(f"report.html has {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    check_losses(folder)
    check_samples(folder)
    check_report(folder)
