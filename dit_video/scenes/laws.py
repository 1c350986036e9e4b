"""Scenes that each show one law of motion, drawn so that a clip decides whether it is kept.

They have the parts and the laws of scenes of level 3 (`draw_scene`), with few objects, a camera at rest and
no figure. Speeds and gravity are those of the data, in shorter sides of a frame per second.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.scenes import Occluder, Scene, SceneObject, simulate
from dit_video.scenes.draw import FPS
from dit_video.scenes.physics import exchange_momentum
from dit_video.scenes.scene import BACKGROUNDS, COLOURS, GRAVITY, RADII, TEXTURES
from dit_video.tokens import Grid

Law = Literal["free_fall", "bounce", "collision", "permanence"]
"""Law that a scene shows: gravity, reflection at a wall, momentum of two discs, or motion behind a post."""
LAWS: tuple[Law, ...] = get_args(Law)
SIZES: dict[Law, tuple[Grid, ...]] = {
    "free_fall": (Grid(9, 48, 48), Grid(9, 48, 80)),
    "bounce": (Grid(17, 48, 48), Grid(17, 48, 80), Grid(17, 80, 48)),
    "collision": (Grid(17, 48, 80), Grid(17, 80, 48)),
    "permanence": (Grid(25, 48, 80),),
}
"""Frames, heights and widths of the scenes of each law, the smallest that show it. A fall from rest reaches the floor
after 9 frames at 8 per second, and what is behind a post is hidden for about half of the frames. Frames are 1 + 4k, and
sides multiples of 16, as autoencoders and denoisers need them."""
_HUES = tuple(name for name in COLOURS if name != "white")
"""Colours of objects. White with a texture is as grey as the post, and as the lightest grey background."""
_SYMMETRIC_SHAPES = ("circle", "square", "ring", "cross")
MIN_FRAMES = 5
"""Number of frames before a contact and after it, at least."""
_MARGIN = 1.0
"""Distance in pixels that objects keep from the borders, at least, other than from a wall that they bounce off."""
_MAX_TRIES = 2000


def draw_physics_scene(
    index: int, *, seed: int, law: str, sizes: Sequence[Grid] | None = None, fps: float = FPS
) -> Scene:
    """Draw scene `index` of a law, which is a function of the arguments alone.

    Args:
      index: Number of the scene.
      seed: Seed of the scenes.
      law: Law that the scene shows, one of `LAWS`.
      sizes: Sizes that a scene may have; by default those of `SIZES`.
      fps: Frames per second.

    Raises:
      UserError: If the law is unknown, or cannot be seen in a size.
    """
    if law not in LAWS:
        raise UserError(f"law={law!r} is invalid: no scenes show it. Use one of {', '.join(LAWS)}.")
    generator = rng.make_generator(seed, f"physics scenes of {law}", index)
    choices = SIZES[law] if sizes is None else sizes
    if not choices:
        raise UserError("sizes=[] is invalid: there must be at least one. Use the default, or name sizes.")
    size = choices[int(generator.integers(len(choices)))]
    for _ in range(_MAX_TRIES):
        background = str(generator.choice(list(BACKGROUNDS)))
        scene = Scene(level=3, size=size, fps=fps, background=background, objects=())
        drawn = _DRAWS[law](generator, scene)
        if drawn is None:
            continue
        events = tuple(event.kind for event in simulate(drawn).events)
        if events == ((law,) if law in ("bounce", "collision") else ()):
            return replace(drawn, contacts=events)
    raise UserError(f"sizes={size} at fps={fps} is invalid: {law} does not fit. Use larger frames, or more of them.")


def _draw_objects(
    generator: np.random.Generator,
    scene: Scene,
    *,
    shapes: Sequence[str],
    sizes: Sequence[str],
) -> Iterator[SceneObject]:
    """Yield objects at rest in the corner, each of another colour."""
    side = min(scene.size.h, scene.size.w)
    for colour in generator.permutation(_HUES):
        size = str(generator.choice(list(sizes)))
        yield SceneObject(
            colour=str(colour),
            texture=str(generator.choice(TEXTURES)),
            shape=str(generator.choice(list(shapes))),
            size=size,
            radius=float(side * generator.uniform(*RADII[size])),
            start=(0.0, 0.0),
            velocity=(0.0, 0.0),
        )


def _move(each: SceneObject, start: np.ndarray, velocity: np.ndarray) -> SceneObject:
    return replace(each, start=(float(start[0]), float(start[1])), velocity=(float(velocity[0]), float(velocity[1])))


def _is_inside(scene: Scene, centre: np.ndarray, radius: float) -> bool:
    """Return True if an object keeps its distance from the borders."""
    reach = radius + _MARGIN
    return bool(((centre >= reach) & (centre <= np.array(scene.size[1:]) - reach)).all(axis=0))


def _get_seconds(scene: Scene) -> float:
    return (scene.size.t - 1) / scene.fps


def _draw_contact_seconds(generator: np.random.Generator, scene: Scene) -> float | None:
    """Return the time of a contact with enough frames before and after it; None for a clip with too few."""
    first, last = (MIN_FRAMES - 1) / scene.fps, _get_seconds(scene) - (MIN_FRAMES - 1) / scene.fps
    return float(generator.uniform(first, last)) if last > first else None


def _draw_free_fall(generator: np.random.Generator, scene: Scene) -> Scene | None:
    """Return an object that falls from vertical rest, and reaches no border."""
    side, seconds = min(scene.size.h, scene.size.w), _get_seconds(scene)
    each = next(_draw_objects(generator, scene, shapes=_SYMMETRIC_SHAPES, sizes=("small",)))
    gravity = GRAVITY * side
    start = generator.uniform((0, 0), scene.size[1:])
    velocity = np.array([0.0, side * generator.uniform(-0.3, 0.3)])
    end = start + velocity * seconds + np.array([gravity * seconds**2 / 2, 0.0])
    if not all(_is_inside(scene, centre, each.radius) for centre in (start, end)):
        return None
    return replace(scene, objects=(_move(each, start, velocity),), gravity=gravity)


def _draw_bounce(generator: np.random.Generator, scene: Scene) -> Scene | None:
    """Return a disc that bounces off one wall."""
    side, contact_seconds = min(scene.size.h, scene.size.w), _draw_contact_seconds(generator, scene)
    if contact_seconds is None:
        return None
    each = next(_draw_objects(generator, scene, shapes=("circle",), sizes=("small", "large")))
    axis, is_far = int(generator.integers(2)), bool(generator.integers(2))
    # At a right angle to the wall a reflection is the way back.
    angle = generator.uniform(0.25, 1.0) * (1 if generator.integers(2) else -1)
    velocity = side * generator.uniform(0.3, 0.5) * np.array([np.cos(angle), np.sin(angle)])
    velocity = velocity[[axis, 1 - axis]] * np.where(np.arange(2) == axis, 1 if is_far else -1, 1)
    contact = generator.uniform((0, 0), scene.size[1:])
    contact[axis] = scene.size[1 + axis] - each.radius if is_far else each.radius
    start = contact - velocity * contact_seconds
    mirrored = np.where(np.arange(2) == axis, -velocity, velocity)
    end = contact + mirrored * (_get_seconds(scene) - contact_seconds)
    if not all(_is_inside(scene, centre, each.radius) for centre in (start, end)):
        return None
    return replace(scene, objects=(_move(each, start, velocity),))


def _draw_collision(generator: np.random.Generator, scene: Scene) -> Scene | None:
    """Return two discs that collide once and reach no border."""
    side, contact_seconds = min(scene.size.h, scene.size.w), _draw_contact_seconds(generator, scene)
    if contact_seconds is None:
        return None
    drawn = _draw_objects(generator, scene, shapes=("circle",), sizes=("small", "large"))
    first, second = next(drawn), next(drawn)
    angle = generator.uniform(0, 2 * np.pi)
    normal, tangent = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
    middle = np.array(scene.size[1:]) * generator.uniform(0.4, 0.6, size=2)
    masses = np.array([first.radius, second.radius]) ** 2
    # The centre of mass moves slowly, so that both discs stay in the frame.
    approach, slip = side * generator.uniform(0.35, 0.6), side * generator.uniform(-0.2, 0.2)
    shares = masses[::-1] / masses.sum(axis=0) * np.array([1, -1])
    drift = side * generator.uniform(-0.1, 0.1, size=2)
    before = drift + shares[:, None] * (approach * normal + slip * tangent)
    after = exchange_momentum(before, masses, normal)
    objects = []
    for each, old, new, sign in zip((first, second), before, after, (-1, 1), strict=True):
        contact = middle + sign * each.radius * normal
        start = contact - old * contact_seconds
        end = contact + new * (_get_seconds(scene) - contact_seconds)
        if not all(_is_inside(scene, centre, each.radius) for centre in (start, contact, end)):
            return None
        objects.append(_move(each, start, old))
    return replace(scene, objects=tuple(objects))


def _draw_permanence(generator: np.random.Generator, scene: Scene) -> Scene | None:
    """Return an object that passes behind a post which hides all of it for a while."""
    side, seconds = min(scene.size.h, scene.size.w), _get_seconds(scene)
    each = next(_draw_objects(generator, scene, shapes=_SYMMETRIC_SHAPES, sizes=("small",)))
    post = Occluder(column=float(scene.size.w * generator.uniform(0.45, 0.55)), half_width=each.radius + 1)
    sign = -1 if generator.integers(2) else 1
    velocity = side * np.array([generator.uniform(-0.1, 0.1), sign * generator.uniform(0.22, 0.45)])
    middle = np.array([scene.size.h * generator.uniform(0.2, 0.8), post.column])
    start = middle - velocity * seconds * generator.uniform(0.45, 0.55)
    if not all(_is_inside(scene, centre, each.radius) for centre in (start, start + velocity * seconds)):
        return None
    columns = start[1] + velocity[1] * np.arange(scene.size.t) / scene.fps
    side_of_post = sign * (columns - post.column)
    is_free = np.abs(side_of_post) > post.half_width + each.radius + 1
    if min((is_free & (side_of_post < 0)).sum(axis=0), (is_free & (side_of_post > 0)).sum(axis=0)) < MIN_FRAMES:
        return None
    return replace(scene, objects=(_move(each, start, velocity),), occluder=post)


_DRAWS: dict[Law, Callable[[np.random.Generator, Scene], Scene | None]] = {
    "free_fall": _draw_free_fall,
    "bounce": _draw_bounce,
    "collision": _draw_collision,
    "permanence": _draw_permanence,
}
