"""Pretrained networks that measure or condition, with weights from the user's files."""

from dit_video.features.clip import (
    ClipConfig,
    ClipImageProcessor,
    ClipTextConfig,
    ClipVisionConfig,
    FrameEncoder,
)
from dit_video.features.lpips import Lpips
