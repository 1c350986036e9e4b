"""Motion of the objects of a scene: uniform acceleration, elastic bounces off walls and collisions of two discs.

Objects collide as discs of their radius whose mass is the square of it. Between contacts positions are exact; contacts
are found on a grid of steps, so that energy is kept to about a thousandth.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from dit_video.scenes.scene import Scene

_STEPS_PER_SECOND = 480


class SceneEvent(NamedTuple):
    """A contact."""

    kind: Literal["bounce", "collision"]
    seconds: float
    objects: tuple[int, ...]
    """Numbers of the objects: one that bounces off a wall, or two that collide."""
    position: tuple[float, float]
    """Row and column of the contact in the first frame's pixels."""


class Trajectories(NamedTuple):
    """Positions of the objects at each frame."""

    centres: Float[np.ndarray, "T N 2"]
    angles: Float[np.ndarray, "T N"]
    events: tuple[SceneEvent, ...]


def simulate(scene: Scene) -> Trajectories:
    """Return the motion of a scene's objects."""
    if scene.actions:
        return _steer(scene)
    frames, height, width = scene.size
    count, objects = len(scene.objects), scene.objects
    positions = np.array([each.start for each in objects], np.float64).reshape(count, 2)
    velocities = np.array([each.velocity for each in objects], np.float64).reshape(count, 2)
    radii = np.array([each.radius for each in objects], np.float64)
    spins = np.array([each.spin for each in objects], np.float64)
    acceleration = np.array([scene.gravity, 0.0])
    steps_per_frame = max(1, round(_STEPS_PER_SECOND / scene.fps))
    dt = 1.0 / (scene.fps * steps_per_frame)
    pairs = [
        (first, second)
        for first in range(count)
        for second in range(first + 1, count)
        if objects[first].depth == objects[second].depth
    ]
    centres, events = [positions.copy()], []
    for step in range(1, (frames - 1) * steps_per_frame + 1):
        positions += velocities * dt + 0.5 * acceleration * dt**2
        velocities += acceleration * dt
        if scene.has_walls:
            events += _bounce(positions, velocities, radii, (height, width), scene.gravity, step * dt)
        for pair in pairs:
            events += _collide(positions, velocities, radii, pair, step * dt)
        if step % steps_per_frame == 0:
            centres.append(positions.copy())
    times = np.arange(frames) / scene.fps
    return Trajectories(np.stack(centres), times[:, None] * spins, tuple(events))


def _steer(scene: Scene) -> Trajectories:
    """Return the motion of an object that actions move, and that borders stop."""
    (each,) = scene.objects
    centres = [np.array(each.start, np.float64)]
    for action in scene.actions:
        centres.append(np.clip(centres[-1] + action, each.radius, np.array(scene.size[1:]) - each.radius))
    return Trajectories(np.stack(centres)[:, None], np.zeros((scene.size.t, 1)), ())


def _bounce(
    positions: np.ndarray,
    velocities: np.ndarray,
    radii: np.ndarray,
    sides: tuple[int, int],
    gravity: float,
    seconds: float,
) -> list[SceneEvent]:
    """Reflect objects at the walls, and return their bounces."""
    reach = radii[:, None]
    if ((positions >= reach) & (positions <= np.array(sides) - reach)).all():
        return []
    events = []
    for axis, side in enumerate(sides):
        for wall, sign in ((radii, 1), (side - radii, -1)):
            is_through = (sign * (positions[:, axis] - wall) < 0) & (sign * velocities[:, axis] < 0)
            for index in np.flatnonzero(is_through):
                excess = positions[index, axis] - wall[index]
                positions[index, axis] -= 2 * excess
                speed = velocities[index, axis]
                # The height that the reflection takes away, or adds, is that of the energy.
                kinetic = speed**2 + 2 * gravity * (positions[index, axis] - wall[index] - excess) * (axis == 0)
                velocities[index, axis] = -np.sign(speed) * np.sqrt(max(kinetic, 0.0))
                contact = positions[index].copy()
                contact[axis] = wall[index] - sign * radii[index]
                events.append(SceneEvent("bounce", seconds, (int(index),), (float(contact[0]), float(contact[1]))))
    return events


def _collide(
    positions: np.ndarray, velocities: np.ndarray, radii: np.ndarray, pair: tuple[int, int], seconds: float
) -> list[SceneEvent]:
    """Exchange the momentum of two objects that touch and approach each other, and return the collision."""
    first, second = pair
    offset = positions[second] - positions[first]
    distance = float(np.hypot(*offset))
    if distance >= radii[first] + radii[second] or distance == 0.0:
        return []
    normal = offset / distance
    indices = [first, second]
    if (velocities[first] - velocities[second]) @ normal <= 0.0:
        return []
    velocities[indices] = exchange_momentum(velocities[indices], radii[indices] ** 2, normal)
    contact = positions[first] + normal * radii[first]
    return [SceneEvent("collision", seconds, pair, (float(contact[0]), float(contact[1])))]


def exchange_momentum(velocities: np.ndarray, masses: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Return the velocities of two discs after an elastic collision `[2 2]`.

    Args:
      velocities: Velocities before it, `[2 2]`.
      masses: Their masses, `[2]`.
      normal: Unit vector from the first to the second, `[2]`.
    """
    approach = (velocities[0] - velocities[1]) @ normal
    impulse = 2 * approach * masses.prod(axis=0) / masses.sum(axis=0) * normal
    return velocities + np.stack([-impulse / masses[0], impulse / masses[1]])
