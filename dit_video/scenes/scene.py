"""Description of a scene, and its caption: objects, a figure, an occluder, the background and the camera's motion."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dit_video.tokens import Grid

COLOURS = {
    "red": (222, 58, 50),
    "green": (52, 176, 80),
    "blue": (64, 104, 232),
    "yellow": (236, 204, 60),
    "purple": (152, 72, 200),
    "orange": (240, 136, 40),
    "white": (236, 236, 236),
    "cyan": (60, 196, 208),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
SHAPES = ("circle", "square", "triangle", "ring", "cross")
BACKGROUNDS = {"black": (24, 24, 30), "grey": (96, 98, 104), "brown": (92, 66, 44), "navy": (26, 34, 78)}
RADII = {"small": (0.15, 0.17), "large": (0.21, 0.23)}
"""Smallest and largest radius by size, relative to the shorter side of a frame."""
SPEEDS = {"slowly": (0.15, 0.18), "quickly": (0.23, 0.26)}
"""Smallest and largest speed by name, in shorter sides of a frame per second."""
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Directions of motion as (rows, columns)."""
RELATIONS = {"to the left of": (1, 1), "to the right of": (1, -1), "above": (0, 1), "below": (0, -1)}
"""Relations of the first object to the second: an axis, and the sign along it from the first to the second."""
GRAVITY = 1.2
"""Acceleration of falling objects, in shorter sides of a frame per second squared."""
CAMERA_MOTIONS = (
    "pans left",
    "pans right",
    "pans up",
    "pans down",
    "zooms in",
    "zooms out",
    "turns clockwise",
    "turns counterclockwise",
)
FIGURE_ACTIONS = ("waves", "walks left", "walks right", "jumps")
Level = Literal[1, 2, 3]
"""Difficulty of a scene: one object; two objects with a relation; several objects, physics, figures and a camera."""

_CONTACT_VERBS = {"bounce": "bounce", "collision": "collide"}
_NUMBERS = ("nothing", "one object", "two objects", "three objects", "four objects", "five objects")


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """A rigid textured object."""

    colour: str
    texture: str
    shape: str
    size: str
    radius: float
    """Half the side of its bounding box, in pixels."""
    start: tuple[float, float]
    """Row and column of its centre in the first frame, in pixels."""
    velocity: tuple[float, float]
    """Rows and columns per second in the first frame."""
    spin: float = 0.0
    """Angle per second, in radians; from rows to columns is positive."""
    depth: float = 1.0
    """Distance from the camera. Objects of one depth collide; nearer ones hide others, and move more when it pans."""
    direction: str | None = None
    """Direction of its motion in the caption; None for an object that stands still, or moves as the physics asks."""
    speed: str | None = None
    """Speed of its motion in the caption."""

    @property
    def phrase(self) -> str:
        """Return its description, such as `a small red striped circle`."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {self.size} {self.colour} {texture}{self.shape}"


@dataclass(frozen=True, kw_only=True)
class StickFigure:
    """A figure of a head, a trunk and limbs of two segments, which moves its joints."""

    action: str
    colour: str
    height: float
    """Height from the feet to the top of the head, in pixels."""
    start: tuple[float, float]
    """Row of its feet and column of its hips in the first frame, in pixels."""
    depth: float = 1.5


@dataclass(frozen=True, kw_only=True)
class Occluder:
    """A post in front of the objects."""

    column: float
    """Column of its centre in the first frame, in pixels."""
    half_width: float
    depth: float = 0.5


@dataclass(frozen=True, kw_only=True)
class CameraMotion:
    """Motion of the camera, uniform in time, about the centre of the frame."""

    caption: str | None = None
    """Its verb phrase, one of `CAMERA_MOTIONS`; None for a camera at rest."""
    pan: tuple[float, float] = (0.0, 0.0)
    """Rows and columns per second, in pixels at depth 1."""
    zoom: float = 1.0
    """Factor of the picture's scale per second."""
    turn: float = 0.0
    """Angle per second by which the picture turns, in radians."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that a clip is rendered from."""

    colours: ClassVar[tuple[str, ...]] = tuple(COLOURS)
    """Colours of objects."""
    level: Level
    size: Grid
    """Frames, height and width of the clip."""
    fps: float
    background: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None
    """Relation of the first object to the second at the start, a key of `RELATIONS`."""
    gravity: float = 0.0
    """Acceleration downwards, in pixels per second squared."""
    has_walls: bool = True
    """Objects bounce off the borders of the first frame."""
    is_loop: bool = False
    """Objects that leave the frame come in at the opposite border, and the last frame is as the first."""
    contacts: tuple[str, ...] = ()
    """Kinds of contacts in the clip that the caption tells of: `bounce`, `collision`."""
    figure: StickFigure | None = None
    occluder: Occluder | None = None
    camera: CameraMotion = CameraMotion()
    actions: tuple[tuple[float, float], ...] = ()
    """Rows and columns by which the only object is moved before each frame after the first, in pixels, as far as the
    borders let it; empty for objects that move by themselves."""

    @property
    def caption(self) -> str:
        """Return the caption of the scene."""
        is_clip = self.size.t > 1
        parts = [self._describe_objects(has_motion=is_clip and not self.actions)] if self.objects else []
        if self.figure is not None:
            action = f" that {self.figure.action}" if is_clip else ""
            parts.append(f"a {self.figure.colour} stick figure{action}")
        if self.occluder is not None:
            parts.append("a grey post in front")
        if self.camera.caption is not None and is_clip:
            parts.append(f"while the camera {self.camera.caption}")
        parts += ["in a loop"] if self.is_loop else ["steered"] if self.actions else []
        return ", ".join([*parts, f"in front of a {self.background} background"])

    def _describe_objects(self, *, has_motion: bool) -> str:
        if self.level < 3:
            phrases = [_describe_object(each, has_motion=has_motion) for each in self.objects]
            return phrases[0] if self.relation is None else f" {self.relation} ".join(phrases)
        phrase = f"{_NUMBERS[len(self.objects)]}, {_join([each.phrase for each in self.objects])}"
        if not has_motion:
            return phrase
        verbs = ["fall" if self.gravity else "drift", *(_CONTACT_VERBS[each] for each in self.contacts)]
        return f"{phrase} that {_join(verbs)}"


def _describe_object(each: SceneObject, *, has_motion: bool) -> str:
    if not has_motion:
        return each.phrase
    motion = "standing still" if each.direction is None else f"moving {each.direction}"
    return " ".join(filter(None, (each.phrase, motion, each.speed)))


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
