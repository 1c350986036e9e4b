"""Mapping of colours to sRGB: of high dynamic range (HDR), and of pictures with a colour profile (ICC).

A display of standard dynamic range shows the light of PQ and HLG (ITU-R BT.2100) unchanged up to diffuse white,
203 cd/m² (ITU-R BT.2408), which becomes 255; highlights, and colours outside of BT.709, are clipped.
"""

import functools
import io

import numpy as np
from jaxtyping import Float32, UInt8, UInt16
from PIL import Image, ImageCms

DIFFUSE_WHITE = 203.0
"""Light of diffuse white, in cd/m²."""
TRANSFERS = {16: "pq", 18: "hlg"}
"""Transfer functions of HDR by ISO/IEC 23091-2's number."""
_HLG_PEAK, _HLG_GAMMA = 1000.0, 1.2
"""Peak of the display that HLG is mapped for, in cd/m², and its system gamma."""
_DISPLAY_GAMMA = 2.4
"""Gamma of a display of standard dynamic range (ITU-R BT.1886)."""
_D65 = (0.3127, 0.3290)
_PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
"""Chromaticities of red, green and blue by ISO/IEC 23091-2's number: BT.709, BT.2020 and P3, with the white D65."""
_BT709, _BT2020 = 1, 9


def map_to_sdr(picture: UInt16[np.ndarray, "h w 3"], transfer: str, primaries: int) -> UInt8[np.ndarray, "h w 3"]:
    """Return a picture for a display of standard dynamic range.

    Args:
      picture: Full-range signal, as RGB.
      transfer: Transfer function of the signal, "pq" or "hlg".
      primaries: ISO/IEC 23091-2's number of the primaries; BT.2020 stands for unknown ones.
    """
    light = _make_light_table(transfer)[picture]
    if transfer == "hlg":  # from the light of the scene to the light of the display
        luminance = light @ _compute_xyz_matrix(_BT2020)[1].astype(np.float32)
        light = light * (_HLG_PEAK / DIFFUSE_WHITE * luminance ** (_HLG_GAMMA - 1))[..., None]
    light = light @ _compute_conversion(primaries if primaries in _PRIMARIES else _BT2020)
    return np.rint(255 * np.clip(light, 0, 1) ** (1 / _DISPLAY_GAMMA)).astype(np.uint8)


@functools.cache
def _make_light_table(transfer: str) -> Float32[np.ndarray, "65536"]:
    """Return linear light by signal: for PQ relative to diffuse white, for HLG the light of the scene, 0 to 1."""
    signal = np.arange(1 << 16) / 0xFFFF
    if transfer == "pq":  # ITU-R BT.2100, table 4
        power = signal ** (32 / 2523)
        light = (np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)
        return np.asarray(10_000 / DIFFUSE_WHITE * light, np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073  # table 5
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12).astype(np.float32)


@functools.cache
def _compute_conversion(primaries: int) -> Float32[np.ndarray, "3 3"]:
    """Return the matrix by which rows of linear light are multiplied to have BT.709's primaries."""
    return np.asarray((np.linalg.inv(_compute_xyz_matrix(_BT709)) @ _compute_xyz_matrix(primaries)).T, np.float32)


def _compute_xyz_matrix(primaries: int) -> np.ndarray:
    """Return the matrix from linear RGB to CIE XYZ (SMPTE RP 177)."""
    x, y = np.array(_PRIMARIES[primaries]).T
    columns = np.stack([x / y, np.ones(3), (1 - x - y) / y])
    white = np.array([_D65[0] / _D65[1], 1, (1 - sum(_D65)) / _D65[1]])
    return columns * np.linalg.solve(columns, white)


def convert_to_srgb(picture: UInt8[np.ndarray, "H W 3"], profile: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Return a picture in sRGB; unchanged if its profile is sRGB, is not one of RGB, or is damaged."""
    transform = _make_transform(profile)
    if transform is None:
        return picture
    return np.array(ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(picture)), transform))


@functools.lru_cache(maxsize=8)
def _make_transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != "RGB" or "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
