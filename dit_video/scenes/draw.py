"""Random scenes of three levels, each a function of its number and the seed of its data set."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, cast

import numpy as np

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.scenes.physics import simulate
from dit_video.scenes.scene import (
    BACKGROUNDS,
    CAMERA_MOTIONS,
    COLOURS,
    DIRECTIONS,
    FIGURE_ACTIONS,
    GRAVITY,
    RADII,
    RELATIONS,
    SHAPES,
    SPEEDS,
    TEXTURES,
    CameraMotion,
    Level,
    Occluder,
    Scene,
    SceneObject,
    StickFigure,
)
from dit_video.tokens import Grid

FPS = 8.0
FREE_FRAMES = 17
"""Number of frames for which objects of levels 1 and 2 have room, even in shorter clips. In longer ones they have room
for all frames."""
MIN_SIDE = 24
SIDES = ((32, 32), (32, 48), (48, 32))
"""Heights and widths of scenes."""
SIZES = tuple(Grid(t, h, w) for t in (1, 9, 17) for h, w in SIDES)
STEERING = ((0, 0), *DIRECTIONS.values())
"""Rows and columns of the actions that steer an object: none, and one step in each direction."""
ACTION_PIXELS = 1.5
_HELD_FRAMES = (2, 7)
"""Numbers of frames that an action holds: at least the first, and fewer than the second."""
_STILL_PROB, _GRAVITY_PROB, _FIGURE_PROB, _OCCLUDER_PROB, _CAMERA_PROB = 0.2, 0.5, 0.35, 0.35, 0.5
_MAX_TRIES = 1000
SceneKind = Literal["levels", "loops", "steered"]
"""Scenes of the three levels, loops of one object, and an object that is steered."""
_GAP = 2.0
"""Pixels between two objects at the start, at least."""


def draw_kind(
    kind: SceneKind, index: int, *, seed: int, level: int, sizes: Sequence[Grid] = SIZES, fps: float = FPS
) -> Scene:
    """Draw scene `index` of a kind, the level of which counts for `levels` alone; see the functions of the kinds."""
    if kind == "levels":
        return draw_scene(index, seed=seed, level=level, sizes=sizes, fps=fps)
    draw = {"loops": draw_loop, "steered": draw_steered}[kind]
    return draw(index, seed=seed, sizes=sizes, fps=fps)


def draw_scene(index: int, *, seed: int, level: int, sizes: Sequence[Grid] = SIZES, fps: float = FPS) -> Scene:
    """Draw scene `index` of the data set `seed`, which is a function of the arguments alone.

    Raises:
      UserError: If there are no sizes, a size is too small for the objects, or the level is another one.
    """
    if level not in (1, 2, 3):
        raise UserError(f"level={level} is invalid: a scene has one of three levels. Use 1, 2 or 3.")
    if not sizes or min(min(size.h, size.w) for size in sizes) < MIN_SIDE:
        rule = f"there must be at least one, and its sides at least {MIN_SIDE} pixels"
        raise UserError(f"sizes={[str(size) for size in sizes]} are invalid: {rule}. Use larger sizes.")
    generator = rng.make_generator(seed, f"scenes of level {level}", index)
    size = sizes[int(generator.integers(len(sizes)))]
    background = _choose(generator, tuple(BACKGROUNDS))
    for _ in range(_MAX_TRIES):
        scene = Scene(level=cast(Level, level), size=size, fps=fps, background=background, objects=())
        drawn = _draw_level_3(generator, scene) if level == 3 else _draw_lower_level(generator, scene)
        if drawn is not None:
            return drawn
    raise UserError(f"sizes={size} has no room for two objects. Use larger sizes.")


def draw_steered(index: int, *, seed: int, sizes: Sequence[Grid] = SIZES, fps: float = FPS) -> Scene:
    """Draw scene `index` of the data set `seed` in which actions steer an object: each holds for some frames.

    Raises:
      UserError: If there are no sizes, or a size is too small for the object.
    """
    still = draw_scene(index, seed=seed, level=1, sizes=sizes, fps=fps)
    generator, (each,) = rng.make_generator(seed, "actions", index), still.objects
    actions: list[tuple[float, float]] = []
    while len(actions) < still.size.t - 1:
        rows, columns = STEERING[int(generator.integers(len(STEERING)))]
        held = int(generator.integers(*_HELD_FRAMES))
        actions += [(ACTION_PIXELS * rows, ACTION_PIXELS * columns)] * held
    resting = replace(each, velocity=(0.0, 0.0), direction=None, speed=None)
    return replace(still, objects=(resting,), actions=tuple(actions[: still.size.t - 1]))


def draw_loop(index: int, *, seed: int, sizes: Sequence[Grid] = SIZES, fps: float = FPS) -> Scene:
    """Draw the looping scene `index` of the data set `seed`: an object that goes once across the frame.

    Raises:
      UserError: If there are no sizes, or a size is too small for the object or has a single frame.
    """
    if not sizes or min(size.t for size in sizes) < 2:
        rule = "a loop has several frames"
        raise UserError(f"sizes={[str(size) for size in sizes]} are invalid: {rule}. Use larger sizes.")
    still = draw_scene(index, seed=seed, level=1, sizes=sizes, fps=fps)
    generator = rng.make_generator(seed, "loops", index)
    direction, seconds = _choose(generator, tuple(DIRECTIONS)), (still.size.t - 1) / fps
    sides, signs, (each,) = still.size[1:], DIRECTIONS[direction], still.objects
    # Across its way the object stays in the frame; along it any place is the beginning of a loop.
    low = [0.0 if sign else each.radius for sign in signs]
    start = [generator.uniform(first, side - first) for first, side in zip(low, sides, strict=True)]
    velocity = [sign * side / seconds for sign, side in zip(signs, sides, strict=True)]
    moving = replace(
        each, start=(start[0], start[1]), velocity=(velocity[0], velocity[1]), direction=direction, speed=None
    )
    return replace(still, objects=(moving,), has_walls=False, is_loop=True)


def _choose(generator: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(generator.integers(len(values)))]


def _draw_object(
    generator: np.random.Generator, scene: Scene, colour: str, *, can_move: bool, depth: float = 1.0
) -> SceneObject | None:
    """Return an object that stays in the frame, for `FREE_FRAMES` frames or more; None if it has no room to move."""
    side = min(scene.size.h, scene.size.w)
    size = _choose(generator, tuple(RADII))
    radius = side * generator.uniform(*RADII[size])
    is_still = not can_move or generator.random() < _STILL_PROB
    direction = None if is_still else _choose(generator, tuple(DIRECTIONS))
    speed = None if is_still else _choose(generator, tuple(SPEEDS))
    pixels_per_second = 0.0 if speed is None else side * generator.uniform(*SPEEDS[speed])
    sign = (0, 0) if direction is None else DIRECTIONS[direction]
    velocity = (sign[0] * pixels_per_second, sign[1] * pixels_per_second)
    start = []
    for length, rate in zip((scene.size.h, scene.size.w), velocity, strict=True):
        travel = rate * (max(FREE_FRAMES, scene.size.t) - 1) / scene.fps
        low, high = radius - min(travel, 0.0), length - radius - max(travel, 0.0)
        if low > high:
            return None
        start.append(float(generator.uniform(low, high)))
    return SceneObject(
        colour=colour,
        texture=_choose(generator, TEXTURES),
        shape=_choose(generator, SHAPES),
        size=size,
        radius=float(radius),
        start=(start[0], start[1]),
        velocity=(float(velocity[0]), float(velocity[1])),
        depth=depth,
        direction=direction,
        speed=speed,
    )


def _draw_colours(generator: np.random.Generator, count: int) -> list[str]:
    names = list(COLOURS)
    return [names[int(index)] for index in generator.permutation(len(names))[:count]]


def _draw_lower_level(generator: np.random.Generator, scene: Scene) -> Scene | None:
    """Return a scene of level 1 or 2; None if the two objects do not have the relation."""
    colours = _draw_colours(generator, scene.level)
    depths = (1.0, 1.2)
    drawn = [
        _draw_object(generator, scene, colour, can_move=scene.size.t > 1, depth=depth)
        for colour, depth in zip(colours, depths, strict=False)
    ]
    objects = tuple(each for each in drawn if each is not None)
    if len(objects) < len(drawn):
        return None
    if scene.level == 1:
        return replace(scene, objects=objects)
    relation = _choose(generator, tuple(RELATIONS))
    axis, sign = RELATIONS[relation]
    offset = np.subtract(objects[1].start, objects[0].start)
    room = sum(each.radius for each in objects) + _GAP
    # They are apart along the axis of the relation, which is the main direction from one to the other.
    if sign * offset[axis] < room or abs(offset[1 - axis]) > abs(offset[axis]):
        return None
    return replace(scene, objects=objects, relation=relation)


def _draw_level_3(generator: np.random.Generator, scene: Scene) -> Scene | None:
    """Return a scene of level 3; None if its objects overlap."""
    side, count = min(scene.size.h, scene.size.w), int(generator.integers(2, 4))
    has_gravity = generator.random() < _GRAVITY_PROB
    objects = []
    for colour in _draw_colours(generator, count):
        drawn = _draw_object(generator, scene, colour, can_move=False)
        assert drawn is not None  # An object that stands still has room.
        angle, rate = generator.uniform(0, 2 * np.pi), side * generator.uniform(0.2, 0.5)
        velocity = (float(rate * np.sin(angle)), float(rate * np.cos(angle)))
        objects.append(replace(drawn, velocity=velocity, spin=float(generator.uniform(-2.0, 2.0))))
    for first, second in itertools.combinations(objects, 2):
        if np.hypot(*np.subtract(first.start, second.start)) < first.radius + second.radius + _GAP:
            return None
    drawn_scene = replace(
        scene,
        objects=tuple(objects),
        gravity=GRAVITY * side if has_gravity else 0.0,
        figure=_draw_figure(generator, scene) if generator.random() < _FIGURE_PROB else None,
        occluder=_draw_occluder(generator, scene) if generator.random() < _OCCLUDER_PROB else None,
        camera=_draw_camera(generator, side) if generator.random() < _CAMERA_PROB else CameraMotion(),
    )
    return replace(drawn_scene, contacts=tuple(sorted({event.kind for event in simulate(drawn_scene).events})))


def _draw_figure(generator: np.random.Generator, scene: Scene) -> StickFigure:
    height = 0.6 * scene.size.h * generator.uniform(0.9, 1.1)
    start = (0.95 * scene.size.h, scene.size.w * generator.uniform(0.3, 0.7))
    (colour,) = _draw_colours(generator, 1)
    action = _choose(generator, FIGURE_ACTIONS)
    return StickFigure(action=action, colour=colour, height=float(height), start=(float(start[0]), float(start[1])))


def _draw_occluder(generator: np.random.Generator, scene: Scene) -> Occluder:
    width = min(scene.size.h, scene.size.w) * generator.uniform(0.06, 0.1)
    return Occluder(column=float(scene.size.w * generator.uniform(0.3, 0.7)), half_width=float(width))


def _draw_camera(generator: np.random.Generator, side: int) -> CameraMotion:
    caption = _choose(generator, CAMERA_MOTIONS)
    verb, _, way = caption.partition(" ")
    if verb == "pans":
        sign, rate = DIRECTIONS[way], side * generator.uniform(0.1, 0.15)
        return CameraMotion(caption=caption, pan=(float(sign[0] * rate), float(sign[1] * rate)))
    if verb == "zooms":
        factor = generator.uniform(1.1, 1.2)
        return CameraMotion(caption=caption, zoom=float(factor if way == "in" else 1 / factor))
    angle = generator.uniform(0.12, 0.2)
    # The picture turns the other way than the camera; from rows to columns is counterclockwise.
    return CameraMotion(caption=caption, turn=float(angle if way == "clockwise" else -angle))
