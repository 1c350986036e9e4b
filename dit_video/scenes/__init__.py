"""Rendered scenes with their truth: depth, optical flow, masks, poses, camera, events and sound, in three levels."""

from dit_video.scenes.draw import SIDES, SceneKind, draw_scene
from dit_video.scenes.folder import write_folder
from dit_video.scenes.physics import SceneEvent, simulate
from dit_video.scenes.render import RenderedScene, render
from dit_video.scenes.scene import CameraMotion, Level, Occluder, Scene, SceneObject, StickFigure
