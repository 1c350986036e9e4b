"""Transformer of VACE: Wan's with a stack of control layers."""

from dit_video.models.backbones.vace.control import ControlLatents, VaceControl, fold_pixel_mask
from dit_video.models.backbones.vace.model import VaceDitConfig
