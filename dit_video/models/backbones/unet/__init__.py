"""U-Net over space and time, for dense batches and canvases."""

from dit_video.models.backbones.unet.config import UnetArchitecture
from dit_video.models.backbones.unet.model import Unet, UnetConfig
