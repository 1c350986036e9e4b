"""Share of the picture that text covers, by RapidOCR's text detection; needs the extra `ocr`."""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from dit_video.core.errors import MissingError
from dit_video.curation.annotator import Annotator, ClipFile, Column

Detect = Callable[[UInt8[np.ndarray, "H W 3"]], Float[np.ndarray, "n 4 2"]]
"""Function from a picture to the corners (x, y) of its texts, in pixels."""


@dataclass(frozen=True, kw_only=True)
class TextArea(Annotator):
    """Share of the picture that subtitles, titles and watermarks cover."""

    threads: ClassVar[int] = 1  # onnxruntime has threads of its own

    frames: int = 4
    """Maximum number of frames of a clip, at even spacing."""
    max_side: int = 960
    """Maximum height and width in pixels at which text is searched."""

    @property
    def name(self) -> str:
        return "text_area"

    @property
    def columns(self) -> Mapping[str, Column]:
        return {
            "text_area": Column(type=pa.float32(), description="Mean share of the picture that text covers."),
            "max_text_area": Column(
                type=pa.float32(), description="Largest share of the picture that text covers in a frame."
            ),
        }

    @property
    def identity(self) -> str:
        return f"text_area 1, rapidocr {version('rapidocr')}, {self.frames} frames, {self.max_side} pixels"

    def check(self) -> None:
        _open_detector()

    def annotate(self, clip: ClipFile) -> Mapping[str, Any]:
        detect = _open_detector()
        frames = clip.decode_frames(self.frames, max_side=self.max_side).frames
        areas = [compute_covered_share(detect(frame), *frame.shape[:2]) for frame in frames]
        return {"text_area": float(np.mean(areas, axis=0)), "max_text_area": float(max(areas))}


def compute_covered_share(corners: Float[np.ndarray, "n 4 2"], height: int, width: int) -> float:
    """Return the share of a picture that quadrangles cover, which may overlap."""
    canvas = Image.new("1", (width, height))
    draw = ImageDraw.Draw(canvas)
    for each in corners:
        draw.polygon([(float(x), float(y)) for x, y in each], fill=1)
    return float(np.asarray(canvas).mean(axis=(0, 1)))


@functools.cache
def _open_detector() -> Detect:
    try:
        import onnxruntime  # noqa: F401  # RapidOCR would only say so at the first picture
        from rapidocr import RapidOCR
    except ModuleNotFoundError as error:
        raise MissingError(f"text_area needs RapidOCR ({error}); run pip install -e '.[ocr]'") from error
    engine, lock = RapidOCR(params={"Global.log_level": "critical"}), threading.Lock()

    def detect(picture: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "n 4 2"]:
        with lock:
            result = engine(np.ascontiguousarray(picture[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
        return np.zeros((0, 4, 2)) if result.boxes is None else np.asarray(result.boxes, np.float64)

    return detect
