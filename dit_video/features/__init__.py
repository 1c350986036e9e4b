"""Networks that measure or guide, with weights that a user gives."""

from dit_video.features.lpips import Lpips

__all__ = ["Lpips"]
