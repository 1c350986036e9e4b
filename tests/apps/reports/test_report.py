import base64
import re

import numpy as np
import pytest

from dit_video.apps.reports import Chart, Command, Curve, Figure, Reconstruction, Report, Sample, write_report
from dit_video.core.errors import UserError
from dit_video.video import Clip
from support.html_page import HOSTILE, Page


def clip(frames=3, height=32, width=32, caption="a red circle", seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), np.uint8)
    return Clip(frames=values, fps=8.0, caption=caption)


def written(tmp_path, report):
    write_report(tmp_path / "report.html", report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    return Page(text), text


def full_report():
    samples = (
        Sample(clip=clip(3, 32, 32, seed=1), seen=True, verdict={"colour": True, "shape": False}),
        Sample(clip=clip(3, 32, 48, seed=2), prompt="a blue square", seen=False, verdict={"colour": True}),
        Sample(clip=clip(1, 32, 32, seed=3)),
        Sample(clip=clip(9, 48, 32, seed=4), note="seed 4"),
    )
    return Report(
        title="Shapes",
        summary="What was trained.",
        figures=(Figure(label="Colour", value="98 %", note="96–99", share=0.98),),
        samples=samples,
        reconstructions=(
            Reconstruction(original=clip(), decoded=clip(seed=5), values={"PSNR": "31.2 dB", "SSIM": "0.960"}),
        ),
        charts=(Chart(title="Loss", curves=(Curve(name="train", steps=(1, 2, 3), values=(3.0, 2.0, 1.0)),)),),
        metrics={"steps": 3000, "following": {"seen": {"colour": 0.98}, "unseen": {"colour": 0.91}}},
        config={"type": "dit_video.experiment:Experiment", "width": 192},
        commands=(Command(text='sample.py --prompt "a <red> circle"', note="More:"),),
    )


def test_a_full_report_shows_everything(tmp_path):
    page, _ = written(tmp_path, full_report())
    text = " ".join(page.text)
    expected = [
        "98 %",
        "96–99",
        "a blue square",
        "seed 4",
        "31.2",
        "0.960",
        "0.91",
        "not in training",
        'a <red> circle"',
        "192",
    ]
    assert [word for word in expected if word not in text] == []
    assert [a["id"] for a in page.find("section")] == [
        "samples",
        "reconstructions",
        "curves",
        "metrics",
        "commands",
        "config",
    ]
    assert {a["href"] for a in page.find("a")} == {f"#{a['id']}" for a in page.find("section")}
    assert len(page.find("li", **{"class": "yes"})) == 2
    assert [a["aria-label"] for a in page.find("li", **{"class": "no"})] == ["shape: not as prompted"]


def test_every_clip_is_inside_without_loss(tmp_path):
    report = full_report()
    page, _ = written(tmp_path, report)
    images = page.find("img")
    assert len(images) == len(report.samples) + len(report.reconstructions)
    for image in images:
        kind, _, data = image["src"].partition(";base64,")
        assert kind == "data:image/png"
        assert base64.b64decode(data).startswith(b"\x89PNG")
        assert (b"acTL" in base64.b64decode(data)) == ("loop" in image["class"].split())
        assert image["alt"]
    shapes = [(int(image["height"]), int(image["width"])) for image in images[:4]]
    assert shapes == [(48, 32), (32, 32), (32, 48), (32, 32)]
    assert "pixels" in images[0]["class"].split()


@pytest.mark.parametrize(("width", "kind"), [(160, "video/mp4"), (161, "video/webm")])
def test_larger_clips_are_videos(tmp_path, width, kind):
    page, _ = written(tmp_path, Report(title="x", samples=(Sample(clip=clip(12, 120, width)),)))
    (video,) = page.find("video")
    assert video["src"].startswith(f"data:{kind};base64,")
    assert {"autoplay", "loop", "muted", "playsinline"} <= video.keys()
    assert video["aria-label"] == "a red circle"


def test_the_page_needs_no_network(tmp_path):
    page, text = written(tmp_path, full_report())
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert not re.search(r"https?://", text)
    assert not re.search(r"@import|url\(", text)
    assert not page.find("link")


def test_hostile_text_stays_text(tmp_path):
    verdict = {HOSTILE: False}
    report = Report(
        title=HOSTILE,
        summary=HOSTILE,
        figures=(Figure(label=HOSTILE, value=HOSTILE, note=HOSTILE),),
        samples=(
            Sample(clip=clip(caption=HOSTILE), verdict=verdict, note=HOSTILE),
            Sample(clip=clip(), prompt=HOSTILE),
        ),
        reconstructions=(Reconstruction(original=clip(caption=HOSTILE), decoded=clip(), values={HOSTILE: HOSTILE}),),
        charts=(Chart(title=HOSTILE, curves=(Curve(name=HOSTILE, steps=(1,), values=(1.0,)),), note=HOSTILE),),
        metrics={HOSTILE: {HOSTILE: HOSTILE}},
        config={HOSTILE: HOSTILE},
        commands=(Command(text=HOSTILE, note=HOSTILE),),
    )
    page, text = written(tmp_path, report)
    assert len(page.find("script")) == 1
    assert len(page.find("style")) == 1
    assert all(image["src"].startswith("data:") for image in page.find("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert" not in text
    assert HOSTILE in "".join(page.text)


def test_an_empty_report_is_a_page(tmp_path):
    page, text = written(tmp_path, Report(title="Nothing yet"))
    assert page.find("section") == []
    assert page.find("dl") == []
    assert 'id="pause"' not in text


def test_a_chart_says_how_many_losses_are_not_finite(tmp_path):
    curves = (
        Curve(name="empty", steps=(), values=()),
        Curve(name="broken", steps=(1, 2, 3), values=(float("nan"), 2.0, float("inf"))),
    )
    page, text = written(tmp_path, Report(title="x", charts=(Chart(title="Loss", curves=curves),)))
    assert "2 not finite" in " ".join(page.text)
    assert not re.search(r'points="[^"]*(nan|inf)', text)
    page, _ = written(tmp_path, Report(title="x", charts=(Chart(title="Loss", curves=curves[:1]),)))
    assert "No finite values" in " ".join(page.text)


def test_filters_count_what_they_show(tmp_path):
    page, _ = written(tmp_path, full_report())
    assert [a["data-filter"] for a in page.find("button") if "data-filter" in a] == ["all", "unseen", "wrong"]
    assert sum("data-unseen" in a for a in page.find("figure")) == 1
    assert sum("data-wrong" in a for a in page.find("figure")) == 1
    plain = Report(title="x", samples=(Sample(clip=clip()),))
    page, _ = written(tmp_path, plain)
    assert not [a for a in page.find("button") if "data-filter" in a]


def test_many_tiny_clips_stay_small(tmp_path):
    frames = np.random.default_rng(0).normal(20, 2, (17, 32, 40, 3)).clip(0, 255).astype(np.uint8)
    sample = Sample(clip=Clip(frames=frames, fps=8.0, caption="noise"))
    _, text = written(tmp_path, Report(title="x", samples=(sample,) * 72))
    assert len(text) < 5_000_000


def test_parts_of_different_lengths_are_refused():
    with pytest.raises(UserError, match=r"shape \(4, .*original's, \(3, .*; compare clips before resizing"):
        Reconstruction(original=clip(3), decoded=clip(4))
    with pytest.raises(UserError, match="has 2 steps and 1 values"):
        Curve(name="loss", steps=(1, 2), values=(1.0,))
