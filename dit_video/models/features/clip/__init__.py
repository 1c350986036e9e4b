"""CLIP (arXiv 2103.00020): both towers, and the preprocessing of the vision tower's images."""

from dit_video.models.features.clip.frames import FrameEncoder
from dit_video.models.features.clip.images import ClipImageProcessor, preprocess_frames
from dit_video.models.features.clip.layers import ACTIVATIONS, ClipTowerConfig
from dit_video.models.features.clip.model import ClipConfig, ClipTowers
from dit_video.models.features.clip.text import ClipTextConfig
from dit_video.models.features.clip.vision import ClipVisionConfig
