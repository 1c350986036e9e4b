"""The share of the picture that text covers, and the error without the extra."""

import sys

import numpy as np
import pytest

from dit_video.core.errors import MissingError
from dit_video.curation import text_area
from dit_video.curation.text_area import TextArea, compute_covered_share


def test_overlapping_texts_count_once():
    box = np.array([[10, 10], [29, 10], [29, 19], [10, 19]], np.float64)
    assert compute_covered_share(np.stack([box]), 100, 100) == pytest.approx(0.02)
    assert compute_covered_share(np.stack([box, box + 5]), 100, 100) == pytest.approx(0.04 - 15 * 5 / 1e4)
    assert compute_covered_share(np.zeros((0, 4, 2)), 100, 100) == 0


def test_the_error_without_the_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    text_area._open_detector.cache_clear()
    with pytest.raises(MissingError, match=r"pip install -e '\.\[ocr\]'"):
        TextArea().check()


def test_subtitles_are_measured(tmp_path):
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    from PIL import Image, ImageDraw, ImageFont

    from dit_video.curation.annotate import annotate
    from dit_video.data.tables import Table
    from dit_video.video import Clip, encode
    from support.annotated_clips import open_clips

    picture = Image.new("RGB", (640, 360), (90, 110, 130))
    plain = np.asarray(picture)
    font = ImageFont.load_default(size=32)
    ImageDraw.Draw(picture).text((100, 300), "SUBSCRIBE TO MY CHANNEL", font=font, fill="white")
    clips = {"text.png": np.asarray(picture), "plain.png": plain}
    source = open_clips(tmp_path, {name: encode(Clip(frames=each[None], fps=1), "png") for name, each in clips.items()})
    annotate(source, TextArea())
    areas = Table(tmp_path)["text_area"]
    left, top, right, bottom = ImageDraw.Draw(picture).textbbox((100, 300), "SUBSCRIBE TO MY CHANNEL", font=font)
    assert areas[0] == pytest.approx((right - left) * (bottom - top) / (640 * 360), rel=0.6)
    assert areas[1] == 0
