"""Transformer of VACE: Wan's with a stack of control layers."""

from dit_video.backbones.vace.control import ControlLatents, VaceControl, fold_pixel_mask
from dit_video.backbones.vace.model import VaceDitConfig
