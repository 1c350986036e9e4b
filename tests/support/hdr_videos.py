"""Videos of high dynamic range."""

import io
from fractions import Fraction

import av
import numpy as np

NITS = np.array([0, 1, 5, 10, 25, 50, 80, 100, 150, 203, 400, 1000])
"""Display light of a ramp, in cd/m²: 203 is diffuse white (ITU-R BT.2408)."""


def compute_pq(nits):
    """Return the PQ signal of display light (ITU-R BT.2100, table 4)."""
    power = (nits / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def compute_hlg(nits):
    """Return the HLG signal of grey on a display of 1,000 cd/m², whose system gamma is 1.2 (ITU-R BT.2100, table 5)."""
    scene, a, b, c = (nits / 1000) ** (1 / 1.2), 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def encode_ramp(signal, transfer, *, tagged=True):
    """Return a video of grey bars with this signal, in BT.2020 and 10 bits."""
    luma = np.repeat(np.round(64 + 876 * signal).astype(np.uint16), 8)[None].repeat(16, axis=0)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = *luma.shape, "yuv420p10le"
        stream.codec_context.color_trc = transfer
        stream.codec_context.color_range = 1
        if tagged:
            stream.codec_context.color_primaries = stream.codec_context.colorspace = 9
        frame = av.VideoFrame(luma.shape[1], luma.shape[0], "yuv420p10le")
        chroma = np.full((luma.shape[0] // 2, luma.shape[1] // 2), 512, np.uint16)
        for plane, values in zip(frame.planes, (luma, chroma, chroma), strict=True):
            lines = np.zeros((plane.height, plane.line_size // 2), np.uint16)
            lines[:, : values.shape[1]] = values
            plane.update(lines.tobytes())
        frame.pts, frame.time_base = 0, Fraction(1, 8)
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()
