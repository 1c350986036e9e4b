"""Pretrained networks that measure or condition, with weights from the user's files."""

from dit_video.features.clip import ClipConfig, ClipImages, ClipTextConfig, ClipTowers, ClipVisionConfig, FrameEncoder
from dit_video.features.lpips import Lpips

__all__ = ["ClipConfig", "ClipImages", "ClipTextConfig", "ClipTowers", "ClipVisionConfig", "FrameEncoder", "Lpips"]
