"""Defaults of sampling for each published model of Wan: those of its authors.

Sources: `generate.py`, `wan/configs/` and README.md of Wan-Video/Wan2.1 (9737cba) for Wan 2.1, `wan/configs/` of
Wan-Video/Wan2.2 (42bf4cf) for Wan 2.2. Sizes are the authors' default `1280*720`, or the largest that a model supports.
"""

import re
from typing import Literal, NamedTuple

from dit_video.models.backbones.vace.model import VaceDitConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.tokens import Grid

# `sample_neg_prompt` of wan/configs/shared_config.py in both repositories; those of I2V and FLF2V begin with more words
# (wan/configs/wan_i2v_14B.py and wan/configs/__init__.py of Wan2.1).
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，"
    "残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)
_IMAGE_NEGATIVE = "镜头晃动，" + NEGATIVE
_FIRST_AND_LAST_NEGATIVE = "镜头切换，" + _IMAGE_NEGATIVE
_SMALL_SIZE, _LARGE_SIZE = Grid(81, 480, 832), Grid(81, 720, 1280)


class WanDefaults(NamedTuple):
    """Defaults of sampling."""

    size: Grid = _SMALL_SIZE
    """Frames, height and width."""
    steps: int = 50
    guidance: float | tuple[float, float] = 5.0
    """Scale of guidance, one for each of two experts, noisy times first."""
    shift: float | None = None
    """Shift of times; None for the folder's."""
    negative: str = ""
    """Negative prompt."""


class _Model(NamedTuple):
    """Properties that tell a published model from the others."""

    width: int
    layers: int
    input: Literal["text", "image", "first and last image", "text or image", "control"]
    experts: int
    flow_shift: float
    """Shift in the published folder's scheduler_config.json; a folder with another one keeps it."""


_DIFFUSERS = WanDefaults()
_DIFFUSERS_TOKEN_TIME = WanDefaults(size=Grid(121, 704, 1280))
"""Defaults of diffusers' pipelines, for models that were not published by Wan's authors."""

# Their configs differ at most in the shift, which the authors choose by the size.
_SMALL_IMAGE_MODEL = _Model(5120, 40, "image", 1, 3.0)
_LARGE_IMAGE_MODEL = _SMALL_IMAGE_MODEL._replace(flow_shift=5.0)

_PUBLISHED: dict[_Model, WanDefaults] = {
    # 2.1 T2V-1.3B: guidance 6 and a shift of 8 to 12 are recommended in README.md.
    _Model(1536, 30, "text", 1, 3.0): WanDefaults(guidance=6.0, shift=8.0, negative=NEGATIVE),
    # 2.1 T2V-14B.
    _Model(5120, 40, "text", 1, 3.0): WanDefaults(size=_LARGE_SIZE, shift=5.0, negative=NEGATIVE),
    # 2.1 I2V-14B-480P and 720P.
    _SMALL_IMAGE_MODEL: WanDefaults(steps=40, shift=3.0, negative=_IMAGE_NEGATIVE),
    _LARGE_IMAGE_MODEL: WanDefaults(size=_LARGE_SIZE, steps=40, shift=5.0, negative=_IMAGE_NEGATIVE),
    # 2.1 FLF2V-14B-720P.
    _Model(5120, 40, "first and last image", 1, 16.0): WanDefaults(
        size=_LARGE_SIZE, shift=16.0, negative=_FIRST_AND_LAST_NEGATIVE
    ),
    # 2.2 T2V-A14B; the authors list the low-noise expert's guidance first.
    _Model(5120, 40, "text", 2, 3.0): WanDefaults(
        size=_LARGE_SIZE, steps=40, guidance=(4.0, 3.0), shift=12.0, negative=NEGATIVE
    ),
    # 2.2 I2V-A14B.
    _Model(5120, 40, "image", 2, 3.0): WanDefaults(
        size=_LARGE_SIZE, steps=40, guidance=(3.5, 3.5), shift=5.0, negative=NEGATIVE
    ),
    # 2.1 VACE-1.3B and 14B.
    _Model(1536, 30, "control", 1, 3.0): WanDefaults(shift=16.0, negative=NEGATIVE),
    _Model(5120, 40, "control", 1, 3.0): WanDefaults(size=_LARGE_SIZE, shift=16.0, negative=NEGATIVE),
    # 2.2 TI2V-5B.
    _Model(3072, 30, "text or image", 1, 5.0): _DIFFUSERS_TOKEN_TIME._replace(shift=5.0, negative=NEGATIVE),
}


def find_defaults(backbone: WanDitConfig, *, experts: int, flow_shift: float, name: str = "") -> WanDefaults:
    """Return the defaults of a model: its authors', if the folder has the config of a published one, or diffusers'.

    Args:
      backbone: config of its denoiser.
      experts: number of its denoisers, 1 or 2.
      flow_shift: shift of the folder's scheduler.
      name: path of the folder, of which a part such as `I2V-14B-720P` tells 2.1 I2V-14B-480P from 720P.
    """
    model = _Model(backbone.width, backbone.layers, _get_input(backbone), experts, flow_shift)
    resolution = re.search("i2v[^/]*(480|720)p", name.lower())
    if resolution is not None and model[:-1] == _SMALL_IMAGE_MODEL[:-1]:
        published = _SMALL_IMAGE_MODEL if resolution[1] == "480" else _LARGE_IMAGE_MODEL
        defaults, is_changed = _PUBLISHED[published], flow_shift not in (3.0, 5.0)
        return defaults._replace(shift=None) if is_changed else defaults
    if model in _PUBLISHED:
        return _PUBLISHED[model]
    # A folder whose shift was changed keeps it.
    same = (each for other, each in _PUBLISHED.items() if other[:-1] == model[:-1])
    other = _DIFFUSERS_TOKEN_TIME if backbone.time == "token" else _DIFFUSERS
    return next(same, other)._replace(shift=None)


def _get_input(
    backbone: WanDitConfig,
) -> Literal["text", "image", "first and last image", "text or image", "control"]:
    if isinstance(backbone, VaceDitConfig):
        return "control"
    if backbone.time == "token":
        return "text or image"
    if backbone.image_positions is not None:
        return "first and last image"
    return "image" if backbone.cond_channels else "text"
