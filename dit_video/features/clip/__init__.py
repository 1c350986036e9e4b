"""CLIP (arXiv 2103.00020): both towers, and the preprocessing of the vision tower's images."""

from dit_video.features.clip.frames import FrameEncoder
from dit_video.features.clip.images import ClipImages, prepare
from dit_video.features.clip.layers import ACTIVATIONS, ClipTower
from dit_video.features.clip.model import ClipConfig, ClipTowers, unit
from dit_video.features.clip.text import ClipText, ClipTextConfig, TextFeatures
from dit_video.features.clip.vision import ClipVision, ClipVisionConfig, VisionFeatures

__all__ = [
    "ACTIVATIONS",
    "ClipConfig",
    "ClipImages",
    "ClipText",
    "ClipTextConfig",
    "ClipTower",
    "ClipTowers",
    "ClipVision",
    "ClipVisionConfig",
    "FrameEncoder",
    "TextFeatures",
    "VisionFeatures",
    "prepare",
    "unit",
]
