"""Rendering of a scene: frames, and depth, optical flow, instance masks, poses, camera and events, which are known.

Parts are drawn from the farthest to the nearest, each as an outline with an edge of one pixel and a texture that moves
with it. Every part moves by a similarity transform, so that the flow of a pixel is exact for the part that covers most
of it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from dit_video.scenes.camera import make_camera
from dit_video.scenes.description import BACKGROUNDS, COLOURS, Scene, StickFigure
from dit_video.scenes.figure import HEAD_RADIUS, LIMB_RADIUS, LIMBS, compute_joints
from dit_video.scenes.outlines import compute_distance, compute_ground, compute_shade
from dit_video.scenes.physics import SceneEvent, simulate
from dit_video.scenes.similarity import Similarity
from dit_video.scenes.sound import SAMPLE_RATE, synthesize
from dit_video.video import Clip

BACKGROUND_DEPTH = 4.0
POST_COLOUR = (150, 152, 158)


class RenderedScene(NamedTuple):
    """A clip and its truth. Pixel (row, column) has its centre at (row + 0.5, column + 0.5)."""

    clip: Clip
    depth: Float32[np.ndarray, "T H W"]
    """Distance from the camera."""
    flow: Float32[np.ndarray, "T-1 H W 2"]
    """Rows and columns by which the point in a pixel moves until the next frame."""
    is_visible: Bool[np.ndarray, "T-1 H W"]
    """True where that point is in the next frame and is not hidden there."""
    instances: Int32[np.ndarray, "T H W"]
    """Number of the object: 0 for the background, 1 to N, then the figure and the occluder."""
    centres: Float32[np.ndarray, "T N 2"]
    """Rows and columns of the objects' centres in the picture."""
    poses: Float32[np.ndarray, "T J 2"] | None
    """Rows and columns of the figure's joints (`figure.JOINTS`) in the picture; None without a figure."""
    camera: Similarity
    """Map from the first frame at depth 1 to each frame."""
    events: tuple[SceneEvent, ...]
    sound: Float32[np.ndarray, " samples"]
    """Sound of the contacts, at `SAMPLE_RATE`, within [-1, 1]."""
    sample_rate: int = SAMPLE_RATE


class _Part(NamedTuple):
    """A rigid part of the picture."""

    instance: int
    depth: float
    outline: str
    radius: float
    colour: tuple[int, int, int]
    motion: Similarity
    """Map from the part's coordinates to the picture."""
    texture: str = "plain"
    half_length: float = 0.0


def render(scene: Scene) -> RenderedScene:
    """Render a scene.

    Raises:
      UserError: a shape, a texture or a colour that does not exist.
    """
    trajectories = simulate(scene)
    joints = None if scene.figure is None else compute_joints(scene.figure, scene)
    parts = sorted(_list_parts(scene, trajectories.centres, trajectories.angles, joints), key=lambda each: -each.depth)
    frames, height, width = scene.size
    pixels = np.stack(np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij"), axis=-1)
    pixels = np.broadcast_to(pixels, (frames, height, width, 2))
    ground = make_camera(scene, BACKGROUND_DEPTH)
    world = ground.invert(pixels)
    shade = compute_ground(world, min(height, width))
    colours = shade[..., None] * np.array(BACKGROUNDS[scene.background], np.float64)
    depth = np.full((frames, height, width), BACKGROUND_DEPTH, np.float32)
    instances = np.zeros((frames, height, width), np.int32)
    owners = np.zeros((frames, height, width), np.int32)
    flow = _compute_flow(ground, world, pixels)
    for number, part in enumerate(parts, 1):
        points = part.motion.invert(pixels)
        distance = compute_distance(part.outline, points, part.radius, part.half_length)
        coverage = np.clip(0.5 - distance * part.motion.scale[:, None, None], 0.0, 1.0)
        light = compute_shade(part.texture, points, part.radius)[..., None] * np.array(part.colour, np.float64)
        colours += coverage[..., None] * (light - colours)
        is_in_front = coverage > 0.5
        depth[is_in_front], instances[is_in_front], owners[is_in_front] = part.depth, part.instance, number
        flow = np.where(is_in_front[:-1, ..., None], _compute_flow(part.motion, points, pixels), flow)
    cameras = [make_camera(scene, each.depth) for each in scene.objects]
    centres = [camera.apply(trajectories.centres[:, index]) for index, camera in enumerate(cameras)]
    poses = None
    if scene.figure is not None and joints is not None:
        poses = make_camera(scene, scene.figure.depth).apply(joints).astype(np.float32)
    return RenderedScene(
        clip=Clip(frames=np.clip(np.rint(colours), 0, 255).astype(np.uint8), fps=scene.fps, caption=scene.caption),
        depth=depth,
        flow=flow.astype(np.float32),
        is_visible=_find_visible(flow, pixels, owners),
        instances=instances,
        centres=np.reshape(np.array(centres, np.float32), (-1, frames, 2)).swapaxes(0, 1),
        poses=poses,
        camera=make_camera(scene, 1.0),
        events=trajectories.events,
        sound=synthesize(scene, trajectories.events),
    )


def _list_parts(scene: Scene, centres: np.ndarray, angles: np.ndarray, joints: np.ndarray | None) -> list[_Part]:
    """Return the parts of a scene in front of its background."""
    ones, parts = np.ones(scene.size.t), []
    for index, each in enumerate(scene.objects):
        pose = Similarity(ones, angles[:, index], centres[:, index])
        motion = make_camera(scene, each.depth).compose(pose)
        parts.append(_Part(index + 1, each.depth, each.shape, each.radius, COLOURS[each.colour], motion, each.texture))
    instance = len(scene.objects) + 1
    if scene.figure is not None and joints is not None:
        parts += _list_figure_parts(scene, scene.figure, joints, instance)
        instance += 1
    if (post := scene.occluder) is not None:
        shift = np.broadcast_to(np.array([scene.size.h / 2, post.column]), (scene.size.t, 2))
        motion = make_camera(scene, post.depth).compose(Similarity(ones, np.zeros_like(ones), shift))
        parts.append(_Part(instance, post.depth, "post", post.half_width, POST_COLOUR, motion))
    return parts


def _list_figure_parts(scene: Scene, figure: StickFigure, joints: np.ndarray, instance: int) -> list[_Part]:
    camera, ones = make_camera(scene, figure.depth), np.ones(scene.size.t)
    colour = COLOURS[figure.colour]
    head = camera.compose(Similarity(ones, np.zeros_like(ones), joints[:, 0]))
    parts = [_Part(instance, figure.depth, "circle", HEAD_RADIUS * figure.height, colour, head)]
    for first, second in LIMBS:
        along = joints[:, second] - joints[:, first]
        angle = np.arctan2(along[:, 1], along[:, 0])
        middle = (joints[:, first] + joints[:, second]) / 2
        half_length = float(np.hypot(*along[0])) / 2
        motion = camera.compose(Similarity(ones, angle, middle))
        radius = LIMB_RADIUS * figure.height
        parts.append(_Part(instance, figure.depth, "limb", radius, colour, motion, half_length=half_length))
    return parts


def _compute_flow(motion: Similarity, points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return where the points of a part's pixels are in the next frame, relative to the pixels."""
    return motion.take(slice(1, None)).apply(points[:-1]) - pixels[:-1]


def _find_visible(flow: np.ndarray, pixels: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return True where the pixel at the end of a flow is in the frame and belongs to the same part."""
    target = np.floor(pixels[:-1] + flow).astype(int)
    height, width = owners.shape[1:]
    rows, columns = target[..., 0], target[..., 1]
    is_inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    frame = np.arange(1, len(owners))[:, None, None]
    owner = owners[frame, np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)]
    return is_inside & (owner == owners[:-1])
