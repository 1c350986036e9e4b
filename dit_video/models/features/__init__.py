"""Pretrained networks that measure or condition, with weights from the user's files."""

from dit_video.models.features.clip import (
    ClipConfig,
    ClipImageProcessor,
    ClipTextConfig,
    ClipVisionConfig,
    FrameEncoder,
)
from dit_video.models.features.lpips import Lpips
