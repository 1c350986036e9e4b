import asyncio
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

import dit_video
from dit_video.evaluation.shapes import judge

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
PRETRAINED = ROOT / "experiments" / "pretrained" / "shapes"


def executed(path, run, monkeypatch):
    """The notebook after all its cells ran, in its own folder, with another run."""
    monkeypatch.setenv("DIT_VIDEO_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    return asyncio.run(client.async_execute())


def shown(notebook):
    """The HTML of every cell that shows some, by the cell's id."""
    return {
        cell.id: "".join(output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {}))
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert notebook.cells[0].source.startswith("# ")


def test_the_sampling_notebook_runs_and_shows_videos(tiny_run, monkeypatch):
    notebook = executed(ROOT / "experiments" / "notebooks" / "sample.ipynb", tiny_run, monkeypatch)
    pages = shown(notebook)
    assert pages["one-clip"].count("<video") == 1
    assert pages["many-clips"].count("<video") == 3
    assert pages["many-clips"].count("<img") == 1
    assert "a blue triangle" in pages["many-clips"]
    assert pages["seeds"].count("<video") == 4
    assert pages["guidances"].count("<video") == 4
    assert "guidance 8" in pages["guidances"]
    assert pages["reconstruct"].count("<video") == 2
    assert len(set(pages["seeds"].split("<figure"))) == 5  # four different clips


def test_the_checkpoint_that_comes_with_the_repository_samples_what_is_asked():
    assert PRETRAINED.is_dir(), "experiments/pretrained/shapes is missing; the quickstart makes it"
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {"pipeline.json", "autoencoder.safetensors", "denoiser.safetensors"} <= {path.name for path in files}
    pipeline = dit_video.load(PRETRAINED)
    assert {"command", "seed"} <= pipeline.config.made_by.keys()
    clip = pipeline.generate("a red circle moving left", seed=3)
    assert judge(clip).colour == "red"
