"""Joints of a stick figure: a walk, a jump or a wave from sine waves of the angles of its limbs."""

import numpy as np
from jaxtyping import Float

from dit_video.scenes.description import Scene, StickFigure

JOINTS = (
    "head",
    "neck",
    "hips",
    "left elbow",
    "left hand",
    "right elbow",
    "right hand",
    "left knee",
    "left foot",
    "right knee",
    "right foot",
)
"""Names of the joints, in their order in arrays; left and right are those of the picture."""
LIMBS = ((1, 2), (1, 3), (3, 4), (1, 5), (5, 6), (2, 7), (7, 8), (2, 9), (9, 10))
"""Pairs of joints that a limb connects; its length does not change."""
HEAD_RADIUS, LIMB_RADIUS = 0.11, 0.045
"""Radius of the head and half the thickness of a limb, relative to the figure's height."""
_TRUNK, _NECK, _ARM, _LEG = 0.34, 0.13, 0.19, 0.21
"""Lengths relative to the height: hips to neck, neck to the centre of the head, and each of two segments of a limb."""
_STRIDE_SECONDS = 1.0


def compute_joints(figure: StickFigure, scene: Scene) -> Float[np.ndarray, "T J 2"]:
    """Return the rows and columns of the joints at each frame, in the world's pixels."""
    times = np.arange(scene.size.t) / scene.fps
    phase = 2 * np.pi * times / _STRIDE_SECONDS
    length = figure.height
    sway, still = np.sin(phase), np.zeros_like(times)
    lift, drift = np.zeros_like(times), np.zeros_like(times)
    arms, legs, bend = (still - 0.35, still + 0.35), (still - 0.2, still + 0.2), still
    if figure.action.startswith("walks"):
        direction = -1 if figure.action == "walks left" else 1
        drift = direction * 0.5 * length * times
        legs, arms, bend = (0.5 * sway, -0.5 * sway), (-0.4 * sway, 0.4 * sway), direction * 0.25 * (1 - np.cos(phase))
    elif figure.action == "jumps":
        lift = 0.18 * length * np.abs(np.sin(phase / 2))
        arms = (-0.6 - 1.2 * np.abs(np.sin(phase / 2)), 0.6 + 1.2 * np.abs(np.sin(phase / 2)))
    else:
        arms = (still - 0.35, 2.3 + 0.4 * np.sin(2 * phase))
    row, column = figure.start
    hips = np.stack([row - 2 * _LEG * length - lift, column + drift], axis=-1)
    neck = hips - np.array([_TRUNK * length, 0.0])
    joints = [neck - np.array([_NECK * length, 0.0]), neck, hips]
    for origin, angles, segment, knee in ((neck, arms, _ARM, still), (hips, legs, _LEG, bend)):
        for angle in angles:
            middle = origin + segment * length * _direct(angle)
            joints += [middle, middle + segment * length * _direct(angle - knee)]
    return np.stack(joints, axis=1)


def _direct(angle: np.ndarray) -> np.ndarray:
    """Return the unit vector at an angle from straight down towards larger columns."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)
