"""CLIP (arXiv 2103.00020): both towers, and the preprocessing of the vision tower's images."""

from dit_video.features.clip.frames import FrameEncoder
from dit_video.features.clip.images import ClipImageProcessor, preprocess_frames
from dit_video.features.clip.layers import ACTIVATIONS, ClipTowerConfig
from dit_video.features.clip.model import ClipConfig, ClipTowers, l2_normalize
from dit_video.features.clip.text import ClipText, ClipTextConfig, TextFeatures
from dit_video.features.clip.vision import ClipVision, ClipVisionConfig, VisionFeatures

__all__ = [
    "ACTIVATIONS",
    "ClipConfig",
    "ClipImageProcessor",
    "ClipText",
    "ClipTextConfig",
    "ClipTowerConfig",
    "ClipTowers",
    "ClipVision",
    "ClipVisionConfig",
    "FrameEncoder",
    "TextFeatures",
    "VisionFeatures",
    "l2_normalize",
    "preprocess_frames",
]
