"""The camera of a scene: where points of the world are in the picture."""

import numpy as np

from dit_video.scenes.description import Scene
from dit_video.scenes.similarity import Similarity


def make_camera(scene: Scene, depth: float) -> Similarity:
    """Return the map from the world at a depth to the picture, in pixels; in the first frame they are the same.

    A camera that pans moves what is at depth 2 half as far as what is at depth 1. Zoom and turn are about the centre of
    the frame, at every depth alike.
    """
    times = np.arange(scene.size.t) / scene.fps
    motion = scene.camera
    centre = np.array([scene.size.h, scene.size.w]) / 2
    view = Similarity(motion.zoom**times, motion.turn * times, np.broadcast_to(centre, (len(times), 2)))
    shifts = -centre - times[:, None] * np.array(motion.pan) / depth
    return view.compose(Similarity(np.ones_like(times), np.zeros_like(times), shifts))
