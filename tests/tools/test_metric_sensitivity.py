"""The figure of how distances grow with distortions, on few clips."""

import json
from pathlib import Path

import pytest

from dit_video.scenes import shapes
from dit_video.tokens import Grid

pytestmark = pytest.mark.slow

SEVERITIES = {"noise": (10, 80), "blur": (1, 8)}


@pytest.mark.parametrize("kind", ["scenes", "crops"])
def test_distances_from_the_same_clips_grow_with_the_severity(kind, load_file, tmp_path, monkeypatch, capsys):
    module = load_file(Path(__file__).resolve().parents[2] / "tools" / "metric_sensitivity.py")
    monkeypatch.setattr(module, "SEVERITIES", SEVERITIES)
    folder = None
    if kind == "crops":
        folder = shapes.write_folder(tmp_path / "clips", count=3, seed=0, sizes=(Grid(25, 64, 96), Grid(25, 96, 64)))
    module.main(tmp_path / "out.json", count=64, clips=folder)
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["clips"], record["count"]) == (kind, 64)
    rows = {(row["distortion"], row["severity"]): row for row in record["rows"]}
    assert rows["itself", 0]["distance"] == pytest.approx(0, abs=1e-3)
    assert rows["none", 0]["distance"] > 1
    for name, (low, high) in SEVERITIES.items():
        assert 0 < rows[name, low]["paired"] < rows[name, high]["paired"]
    assert "memory after" in capsys.readouterr().out
