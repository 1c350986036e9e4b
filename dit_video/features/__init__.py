"""Networks that measure or guide, with weights that a user gives."""

from dit_video.features.clip import ClipConfig, ClipImages, ClipTextConfig, ClipTowers, ClipVisionConfig, FrameEncoder
from dit_video.features.lpips import Lpips

__all__ = ["ClipConfig", "ClipImages", "ClipTextConfig", "ClipTowers", "ClipVisionConfig", "FrameEncoder", "Lpips"]
