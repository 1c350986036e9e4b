"""Rendering of a scene: frames, and the depth, flow, instances, poses, camera, contacts and sound that belong to them.

Parts are drawn from the farthest to the nearest, each as an outline with an edge of one pixel and a texture that moves
with it. Every part moves by a similarity transform, so that the flow of a pixel is exact for the part that covers most
of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from dit_video.scenes.camera import Similarity, make_camera
from dit_video.scenes.outlines import compute_distance, compute_ground, compute_shade
from dit_video.scenes.physics import SceneEvent, simulate
from dit_video.scenes.scene import BACKGROUNDS, COLOURS, Scene, StickFigure
from dit_video.video import Clip

BACKGROUND_DEPTH = 4.0
_NEAREST_DEPTH = 0.5
"""Depth of the nearest part of scenes, a post."""
POST_COLOUR = (150, 152, 158)
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
"""Names of the joints of a stick figure, in their order in arrays; left and right are those of the picture."""
LIMBS = ((1, 2), (1, 3), (3, 4), (1, 5), (5, 6), (2, 7), (7, 8), (2, 9), (9, 10))
"""Pairs of joints that a limb connects; its length does not change."""
HEAD_RADIUS, LIMB_RADIUS = 0.11, 0.045
"""Radius of the head and half the thickness of a limb, relative to the figure's height."""
_TRUNK, _NECK, _ARM, _LEG = 0.34, 0.13, 0.19, 0.21
"""Lengths relative to the height: hips to neck, neck to the centre of the head, and each of two segments of a limb."""
_STRIDE_SECONDS = 1.0
SAMPLE_RATE = 16_000
"""Samples per second."""
_DECAY_SECONDS, _LENGTH_SECONDS, _AMPLITUDE = 0.06, 0.4, 0.3
_PITCHES = {"bounce": 220.0, "collision": 660.0}
"""Pitch in Hz of a contact of objects that are a tenth of the frame's shorter side in radius."""


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
    """Rows and columns of the figure's joints (`JOINTS`) in the picture; None without a figure."""
    camera: Similarity
    """Map from the first frame at depth 1 to each frame."""
    events: tuple[SceneEvent, ...]
    sound: Float32[np.ndarray, " samples"]
    """Sound of the contacts, at `SAMPLE_RATE`, within [-1, 1]."""
    sample_rate: int = SAMPLE_RATE

    @property
    def depth_clip(self) -> Clip:
        """Return the depth as a clip, in shades of grey that are inverse to it: what is nearest is white."""
        shades = np.rint(255 * _NEAREST_DEPTH / self.depth).clip(0, 255).astype(np.uint8)
        return Clip(frames=np.repeat(shades[..., None], 3, axis=-1), fps=self.clip.fps)


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
      UserError: If a shape, a texture or a colour does not exist.
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
        # What has left the frame of a loop is one frame further back, or is about to come in.
        for back in range(-1, 3) if scene.is_loop else (0,):
            centre = centres[:, index] - back * np.sign(each.velocity) * np.array(scene.size[1:])
            motion = make_camera(scene, each.depth).compose(Similarity(ones, angles[:, index], centre))
            colour = COLOURS[each.colour]
            parts.append(_Part(index + 1, each.depth, each.shape, each.radius, colour, motion, each.texture))
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


def synthesize(scene: Scene, events: Sequence[SceneEvent]) -> Float32[np.ndarray, " samples"]:
    """Return the sound of a scene's events, as long as its clip; a tone begins at the sample of its contact."""
    sound = np.zeros(round(scene.size.t / scene.fps * SAMPLE_RATE), np.float64)
    times = np.arange(round(_LENGTH_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    for event in events:
        start = round(event.seconds * SAMPLE_RATE)
        radius = np.mean([scene.objects[index].radius for index in event.objects])
        pitch = _PITCHES[event.kind] * 0.1 * min(scene.size.h, scene.size.w) / radius
        tone = _AMPLITUDE * np.exp(-times / _DECAY_SECONDS) * np.sin(2 * np.pi * pitch * times)
        room = max(0, min(len(tone), len(sound) - start))
        sound[start : start + room] += tone[:room]
    return np.clip(sound, -1.0, 1.0).astype(np.float32)
