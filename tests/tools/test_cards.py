"""The table of cards: the largest clip that fits, with the options that it takes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_video.core.offload import Stages
from dit_video.tokens import Grid
from support.wan_folders import write_published_folder

NAME = "Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture
def tool(load_file):
    return load_file(Path(__file__).parents[2] / "tools" / "cards.py")


@pytest.fixture
def planned(tool, monkeypatch):
    """Replace plans of sampling, which are compiled for a TPU, and return the sizes that were planned."""
    sizes = []

    def fit_pipeline(folder, topology, memory, *, size=None):
        sizes.append(size)
        size = size or Grid(81, 480, 832)
        peak = size.t * 10**8
        return SimpleNamespace(
            size=size, offload=Stages() if peak > memory // 2 else None, peak=peak, fits=peak <= memory
        )

    monkeypatch.setattr(tool, "fit_pipeline", fit_pipeline)
    return sizes


def test_a_cell_has_the_largest_clip_that_fits(tool, tmp_path, planned, capsys):
    write_published_folder(tmp_path / NAME, NAME)
    target = tmp_path / "cards.json"
    tool.main((tmp_path / NAME,), target, memories=(24,))
    capsys.readouterr()
    tool.main((tmp_path / NAME,), target, memories=(4, 12, 24))
    table = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    assert rows[0] == ["sample", "33 frames, `--offload stages`", "`--offload stages`", "yes"]
    assert rows[1][:2] == ["fine-tune, LoRA", "–"]
    assert "33 frames" in rows[1][2]
    assert rows[2][:3] == ["fine-tune, all weights", "–", "–"]
    assert "`--optimizer adafactor`" in rows[2][3]
    for cell in json.loads(target.read_text()):
        assert cell["peak"] is None or cell["peak"] <= 0.9 * cell["memory"]
    count = len(planned)
    tool.main((tmp_path / NAME,), target, memories=(4, 12, 24))
    assert len(planned) == count
    assert capsys.readouterr().out == table
