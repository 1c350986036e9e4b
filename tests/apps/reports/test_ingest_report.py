"""The page of an ingested data set shows everything, and is the same for the same data."""

import re

import numpy as np
import pytest

from dit_video.apps.reports.ingest_report import write_ingest_report
from dit_video.core.errors import MissingError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.video import Clip
from support.html_page import HOSTILE, Page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    folder = root / "clips"
    folder.mkdir()
    rows, hostile = ["file_name,text"], HOSTILE.replace('"', '""')
    for index in range(30):
        frames = np.random.default_rng(index).integers(0, 255, (1 + 5 * (index % 3), 32, 48, 3), np.uint8)
        Clip(frames=frames, fps=10).save(folder / f"{index:02}.mp4")
        caption = {0: "", 1: hostile}.get(index % 5, f"a film about number {index % 7}")
        rows.append(f'{index:02}.mp4,"{caption}"')
    (folder / "broken.mp4").write_bytes(b"broken")
    (folder / "tiny.png").write_bytes(b"")
    Clip(frames=np.zeros((1, 4, 4, 3), np.uint8), fps=1).save(folder / "tiny.png")
    Clip(frames=np.zeros((1, 40, 40, 3), np.uint8), fps=1).save(folder / "extra.png")
    rows += ["broken.mp4,x", "tiny.png,y"]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    config = IngestConfig(screening=ScreeningConfig(min_size=16, measure=True))
    report = ingest(folder, root / "data", config=config)
    ingest(folder, root / "again", config=config, workers=1)
    return root, report


def test_the_page_shows_everything(made):
    root, report = made
    assert (report.usable, report.files, len(report.quarantined), len(report.dropped)) == (30, 32, 1, 1)
    path = write_ingest_report(root / "data")
    assert path == root / "data" / "REPORT.html"
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.text)
    expected = [
        "30 clips from 32 files",
        "93.7 %",
        "broken.mp4",
        "tiny.png",
        "extra.png",
        "32×48",
        "h264",
        "film",
        "1–2 s",
        "10 fps",
        "a film about number 3",
        "no caption",
        "min_size",
        "Motion",
        "Sharpness",
        "Sound",
        "0 s dropped, 17 s kept, 0 s unreadable.",
    ]
    assert [words for words in expected if words not in text] == []
    assert [a["id"] for a in page.find("section")] == ["files", "clips", "sizes", "captions", "left-out", "settings"]
    assert {a["href"] for a in page.find("a")} == {f"#{a['id']}" for a in page.find("section")}
    assert len(page.find("img")) == 24
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.find("img"))
    (used,) = [a for a in page.find("span") if a.get("class") == "used"]
    assert used["style"] == "flex-grow:30"


def test_the_page_needs_no_network_and_no_scripts(made):
    root, _ = made
    text = write_ingest_report(root / "data").read_text(encoding="utf-8")
    page = Page(text)
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not page.find("script")
    assert not page.find("link")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search(r"@import|url\(", text)
    assert HOSTILE in "".join(page.text)


def test_the_same_data_set_gives_the_same_bytes(made):
    root, _ = made
    first, again = write_ingest_report(root / "data"), write_ingest_report(root / "again")
    assert first.read_bytes() == again.read_bytes()


def test_a_missing_data_set_is_refused(tmp_path):
    with pytest.raises(MissingError):
        write_ingest_report(tmp_path / "nowhere")
