"""A run must have learned and its files must decode: python .ci/check_run.py RUN"""

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path

from dit_video.training.hooks.logging import read
from dit_video.video import decode


def check_losses(run: Path) -> None:
    """Every log of a loss ends lower than it began, by the means of its first and last fifth."""
    logs = {path: [entry["loss"] for entry in read(path) if "loss" in entry] for path in sorted(run.rglob("*.jsonl"))}
    logs = {path: losses for path, losses in logs.items() if losses}
    assert logs, f"no *.jsonl with a loss under {run}"
    for path, losses in logs.items():
        assert len(losses) >= 2, f"{path} has {len(losses)} entries: too few to compare"
        assert all(math.isfinite(loss) for loss in losses), f"{path} has a loss that is not finite"
        fifth = max(1, len(losses) // 5)
        first, last = sum(losses[:fifth]) / fifth, sum(losses[-fifth:]) / fifth
        print(f"{path.relative_to(run)}: loss {first:.4g} -> {last:.4g} over {len(losses)} entries")
        assert last < first, f"the loss of {path} did not fall"


def check_samples(run: Path) -> None:
    """Every file of `prompts.json` decodes at the size that is written there, and no other lies beside them."""
    folder = run / "samples"
    samples = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    assert samples, f"{folder}/prompts.json is empty"
    for sample in samples:
        clip = decode(folder / sample["file"])
        expected = (sample["frames"], sample["height"], sample["width"], 3)
        assert clip.frames.shape == expected, f"{sample['file']} is {clip.frames.shape}, not {expected}"
        assert {"prompt", "seed"} <= sample.keys()
    videos = {path.name for path in folder.iterdir()} - {"prompts.json"}
    assert videos == {sample["file"] for sample in samples}, "samples/ and prompts.json disagree"
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
