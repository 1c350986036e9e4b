"""Synthetic data set of the quickstart: a coloured shape moves over a dark background, as its caption says.

The content of a clip is a `Description` (colour, shape, direction); position and speed are a `Geometry`. Twelve of the
seventy-two descriptions (`HELD_OUT`) never occur in training: samples of them show whether a model has learnt to
compose.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from dit_video.core import rng
from dit_video.core.errors import UserError
from dit_video.scenes.folder import ClipEntry, format_clip_name, write_clip_folder
from dit_video.scenes.scene import Scene, SceneObject
from dit_video.tokens import Grid
from dit_video.video import Clip

FPS = 8.0
FREE_FRAMES = 17
"""Number of first frames in which no shape touches the border."""
MIN_SIDE = 8

BACKGROUND = (16, 18, 28)
COLOURS = {
    "red": (232, 50, 46),
    "green": (48, 200, 80),
    "blue": (56, 96, 240),
    "yellow": (244, 212, 48),
    "magenta": (222, 60, 214),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Direction of motion as (rows, columns), by name."""
IMAGE_SHARE = 0.15
"""Share of clips that are images of one frame."""

SIZES = tuple(Grid(t, h, w) for (h, w), t in itertools.product(((32, 32), (32, 48), (48, 32)), (1, 9, 17)))
"""Sizes of the quickstart's clips."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of a clip; `direction` is None for an image or a shape that does not move."""

    colour: str
    shape: str
    direction: str | None = None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The start, size and speed of a shape, in pixels."""

    row: float
    column: float
    """Centre of the shape's bounding box in the first frame; (0, 0) is the frame's top left corner."""
    radius: float
    """Half the side of the bounding box, which is square for every shape."""
    speed: float
    """Speed in pixels per frame."""


COMBINATIONS = tuple(
    Description(colour=colour, shape=shape, direction=direction)
    for colour, shape, direction in itertools.product(COLOURS, SHAPES, DIRECTIONS)
)


def _choose_held_out() -> tuple[Description, ...]:
    """Return every (shape, direction) once and every colour twice, with two shapes and two directions per colour."""
    directions = tuple(DIRECTIONS)
    return tuple(
        Description(colour=colour, shape=SHAPES[pair % 3], direction=directions[pair % 4])
        for index, colour in enumerate(COLOURS)
        for pair in (index, 6 + (index + 1) % 6)  # 0..11 enumerate the pairs, as 3 and 4 have no common divisor
    )


HELD_OUT = _choose_held_out()
TRAINING = tuple(combination for combination in COMBINATIONS if combination not in HELD_OUT)
IMAGES = tuple(Description(colour=colour, shape=shape) for colour, shape in itertools.product(COLOURS, SHAPES))


def format_caption(description: Description) -> str:
    """Return the caption, e.g. `a red circle moving left`, or `a red circle` if there is no direction."""
    subject = f"a {description.colour} {description.shape}"
    return subject if description.direction is None else f"{subject} moving {description.direction}"


def parse_caption(prompt: str) -> Description:
    """Parse a caption, the inverse of `format_caption`; letter case and additional spaces are ignored.

    Raises:
      UserError: If the prompt does not follow the grammar.
    """
    match prompt.lower().split():
        case ["a", colour, shape] if colour in COLOURS and shape in SHAPES:
            return Description(colour=colour, shape=shape)
        case ["a", colour, shape, "moving", way] if colour in COLOURS and shape in SHAPES and way in DIRECTIONS:
            return Description(colour=colour, shape=shape, direction=way)
    raise UserError(
        f"prompt={prompt!r} is invalid: it must be 'a COLOUR SHAPE [moving DIRECTION]'. Use a COLOUR of "
        f"{', '.join(COLOURS)}, a SHAPE of {', '.join(SHAPES)}, a DIRECTION of {', '.join(DIRECTIONS)}."
    )


def sample_description(generator: np.random.Generator, *, frames: int) -> Description:
    """Draw a random description from `TRAINING`, or from `IMAGES` for one frame."""
    candidates = IMAGES if frames == 1 else TRAINING
    return candidates[int(generator.integers(len(candidates)))]


def sample_geometry(generator: np.random.Generator, description: Description, *, height: int, width: int) -> Geometry:
    """Draw a random radius (5 to 7 pixels), speed (0.55 to 0.8 pixels per frame) and start.

    The start is uniform over all positions from which the shape does not touch the border in its first 17 frames.
    In frames of less than 32 pixels in height or width, radius and speed shrink in proportion.

    Raises:
      UserError: If the frame is too small.
    """
    if min(height, width) < MIN_SIDE:
        raise UserError(f"size={height}x{width} is invalid: a side has at least {MIN_SIDE} pixels. Use a larger size.")
    scale = min(1.0, min(height, width) / 32)
    radius, speed = scale * generator.uniform(5.0, 7.0), scale * generator.uniform(0.55, 0.8)
    motion = (0, 0) if description.direction is None else DIRECTIONS[description.direction]
    start = []
    for side, sign in zip((height, width), motion, strict=True):
        travel = sign * speed * (FREE_FRAMES - 1)
        start.append(float(generator.uniform(radius - min(travel, 0.0), side - radius - max(travel, 0.0))))
    return Geometry(row=start[0], column=start[1], radius=radius, speed=speed)


def compute_centres(
    description: Description, geometry: Geometry, *, frames: int, height: int, width: int
) -> Float[np.ndarray, "T 2"]:
    """Return the (row, column) of the bounding box's centre in every frame; the shape bounces at the border."""
    motion = (0, 0) if description.direction is None else DIRECTIONS[description.direction]
    distance = geometry.speed * np.arange(frames)
    axes = []
    for start, side, sign in zip((geometry.row, geometry.column), (height, width), motion, strict=True):
        free = side - 2 * geometry.radius
        phase = np.mod(start - geometry.radius + sign * distance, 2 * free)
        axes.append(geometry.radius + np.minimum(phase, 2 * free - phase))
    return np.stack(axes, axis=-1)


def render(description: Description, geometry: Geometry, *, frames: int, height: int, width: int) -> Clip:
    """Render a clip at 8 fps, with its caption, anti-aliased by area (exact along columns, 16 lines per pixel row).

    Raises:
      UserError: If the shape is not completely inside its first frame, or there are no frames.
    """
    radius = geometry.radius
    if frames < 1:
        raise UserError(f"frames={frames} is invalid: a clip has at least one frame. Use a larger number.")
    inside = radius <= geometry.row <= height - radius and radius <= geometry.column <= width - radius
    if not inside or min(height, width) <= 2 * radius:
        raise UserError(
            f"a shape of radius={radius:.2f} at row={geometry.row:.2f}, column={geometry.column:.2f} leaves the frame "
            f"of {height}x{width}. Move it inside."
        )
    positions = compute_centres(description, geometry, frames=frames, height=height, width=width)
    alpha = _compute_coverage(description.shape, positions, radius, height, width)[..., None]
    background = np.asarray(BACKGROUND, np.float64)
    pixels = background + alpha * (np.asarray(COLOURS[description.colour], np.float64) - background)
    return Clip(frames=np.rint(pixels).astype(np.uint8), fps=FPS, caption=format_caption(description))


def _compute_coverage(
    shape: str, centres: Float[np.ndarray, "T 2"], radius: float, height: int, width: int, *, lines: int = 16
) -> Float[np.ndarray, "T H W"]:
    """Return the share of each pixel that the shape covers: a scan line crosses a convex shape in one interval."""
    y = (np.arange(height * lines) + 0.5) / lines - centres[:, :1]  # [T, H*lines], relative to the centre
    # A line at the top or bottom edge counts by the part of its thickness that is inside.
    thickness = np.clip((radius - np.abs(y)) * lines + 0.5, 0.0, 1.0)
    y = np.clip(y, -radius, radius)
    if shape == "square":
        half = np.full_like(y, radius)
    elif shape == "circle":
        half = np.sqrt(np.maximum(radius**2 - y**2, 0.0))  # rounding may make the difference slightly negative
    elif shape == "triangle":  # upright: apex at the top, base and height equal
        half = (y + radius) / 2
    else:
        raise UserError(f"shape={shape!r} is invalid. Use one of {', '.join(SHAPES)}.")
    left, right = (centres[:, 1:] - half)[..., None], (centres[:, 1:] + half)[..., None]
    column = np.arange(width)
    covered = np.maximum(np.minimum(right, column + 1) - np.maximum(left, column), 0.0) * thickness[..., None]
    return covered.reshape(len(centres), height, lines, width).mean(axis=2)


def get_centroid_offset(shape: str, radius: float) -> float:
    """Return the rows from the bounding box's centre down to the centroid; a triangle's is at 2/3 of its height."""
    return radius / 3 if shape == "triangle" else 0.0


def render_example(index: int, *, seed: int, sizes: tuple[Grid, ...] = SIZES) -> Clip:
    """Render clip `index` of the data set `seed`; the clip is a function of these alone.

    15 % of the clips are images if `sizes` has sizes of one frame as well as of several frames.
    """
    description, geometry, size = draw_example(index, seed=seed, sizes=sizes)
    return render(description, geometry, frames=size.t, height=size.h, width=size.w)


def draw_example(index: int, *, seed: int, sizes: tuple[Grid, ...] = SIZES) -> tuple[Description, Geometry, Grid]:
    """Draw the description, geometry and size of the clip that `render_example` renders."""
    generator = rng.make_generator(seed, "shapes", index)
    images = tuple(size for size in sizes if size.t == 1)
    videos = tuple(size for size in sizes if size.t > 1)
    image = generator.random() < IMAGE_SHARE
    candidates = (images if image else videos) or images or videos
    size = candidates[int(generator.integers(len(candidates)))]
    description = sample_description(generator, frames=size.t)
    return description, sample_geometry(generator, description, height=size.h, width=size.w), size


@dataclass(frozen=True, kw_only=True)
class ShapeScene(Scene):
    """A clip of this data set as a scene of one object, for those who judge scenes.

    Its colours are among those that they tell apart.
    """

    colours: ClassVar[tuple[str, ...]] = ("red", "green", "blue", "yellow", "white")

    @property
    def caption(self) -> str:
        """Return the clip's caption."""
        return format_caption(self._description)

    @property
    def _description(self) -> Description:
        (shape,) = self.objects
        return Description(colour=shape.colour, shape=shape.shape, direction=shape.direction)

    def render_clip(self) -> Clip:
        """Render the clip."""
        (shape,), (frames, height, width) = self.objects, self.size
        speed = float(np.abs(shape.velocity).sum()) / self.fps
        geometry = Geometry(row=shape.start[0], column=shape.start[1], radius=shape.radius, speed=speed)
        return render(self._description, geometry, frames=frames, height=height, width=width)


def draw_shape_scene(index: int, *, seed: int, sizes: Sequence[Grid] = SIZES) -> ShapeScene:
    """Draw shape `index` of the data set `seed` as a scene."""
    generator = rng.make_generator(seed, "shape scenes", index)
    size = sizes[int(generator.integers(len(sizes)))]
    candidates = [each for each in (IMAGES if size.t == 1 else TRAINING) if each.colour in ShapeScene.colours]
    description = candidates[int(generator.integers(len(candidates)))]
    geometry = sample_geometry(generator, description, height=size.h, width=size.w)
    signs = (0, 0) if description.direction is None else DIRECTIONS[description.direction]
    shape = SceneObject(
        colour=description.colour,
        texture="plain",
        shape=description.shape,
        size="small",
        radius=geometry.radius,
        start=(geometry.row, geometry.column),
        velocity=(FPS * geometry.speed * signs[0], FPS * geometry.speed * signs[1]),
        direction=description.direction,
    )
    return ShapeScene(level=1, size=size, fps=FPS, background="black", objects=(shape,))


def get_file_name(index: int, *, seed: int, sizes: tuple[Grid, ...] = SIZES) -> str:
    """Return the file name under which `write_folder` writes clip `index`."""
    return format_clip_name(index, frames=draw_example(index, seed=seed, sizes=sizes)[2].t)


def write_folder(
    folder: Path,
    *,
    count: int,
    seed: int,
    sizes: tuple[Grid, ...] = SIZES,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Path:
    """Write clips 0 … count-1 as `clips/000000.mp4` (`.png` for one frame) and `metadata.csv` (`file_name,text`).

    A clip whose file exists is not encoded again, and `metadata.csv` is written last, so that repeating an interrupted
    call completes it. `progress(done, total)` is called after every clip. Returns the folder.

    Raises:
      UserError: If there are no sizes or clips, or the folder holds clips of another seed or other sizes.
    """
    if not sizes or count < 1:
        raise UserError(f"count={count} of {len(sizes)} sizes is invalid: use at least one size and one clip")
    entries = []
    for index in range(count):
        description, geometry, size = draw_example(index, seed=seed, sizes=sizes)
        draw = functools.partial(render, description, geometry, frames=size.t, height=size.h, width=size.w)
        entries.append(ClipEntry(format_caption(description), size.t, draw))
    recipe = {"seed": seed, "sizes": [list(size) for size in sizes]}
    write_clip_folder(folder, entries, recipe=recipe, progress=progress)
    return folder
