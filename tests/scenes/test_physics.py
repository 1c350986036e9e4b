"""Motion of objects: free fall, elastic bounces, collisions, and what is kept by them."""

from dataclasses import replace

import numpy as np
import pytest

from dit_video.scenes import Scene, SceneObject, simulate
from dit_video.tokens import Grid

BALL = SceneObject(
    colour="red", texture="plain", shape="circle", size="small", radius=4.0, start=(20.0, 30.0), velocity=(0.0, 0.0)
)
SCENE = Scene(level=3, size=Grid(33, 80, 60), fps=16.0, background="black", objects=(BALL,))


def compute_energy(scene, trajectories):
    """Return kinetic and potential energy between frames, from centres alone, without the frames of a contact."""
    times = np.arange(scene.size.t) / scene.fps
    velocities = np.diff(trajectories.centres, axis=0) * scene.fps
    middles = (trajectories.centres[1:] + trajectories.centres[:-1]) / 2
    masses = np.array([each.radius**2 for each in scene.objects])
    # A chord is lower or higher than its arc by g dt**2 / 8.
    heights = middles[..., 0] - scene.gravity / scene.fps**2 / 8
    energy = (masses * (0.5 * (velocities**2).sum(-1) - scene.gravity * heights)).sum(-1)
    is_free = np.ones(len(energy), bool)
    for event in trajectories.events:
        is_free[min(np.searchsorted(times, event.seconds) - 1, len(energy) - 1)] = False
    return energy[is_free]


def test_an_object_falls_by_the_square_of_time_until_it_bounces():
    scene = replace(SCENE, gravity=40.0, size=Grid(20, 80, 60))
    trajectories = simulate(scene)
    times = np.arange(20) / 16.0
    np.testing.assert_allclose(trajectories.centres[:, 0, 0], 20 + 20 * times**2, atol=1e-9)
    np.testing.assert_allclose(trajectories.centres[:, 0, 1], 30.0)
    assert trajectories.events == ()


def test_an_elastic_bounce_returns_to_the_height_of_the_fall():
    scene = replace(SCENE, gravity=90.0, size=Grid(81, 80, 60))
    trajectories = simulate(scene)
    bounces = [event for event in trajectories.events if event.kind == "bounce"]
    period = 2 * np.sqrt(2 * (80 - 4 - 20) / 90.0)
    seconds = [event.seconds for event in bounces]
    np.testing.assert_allclose(seconds, period * (np.arange(len(bounces)) + 0.5), atol=0.02)
    assert len(bounces) == 2
    assert all(event.position[0] == pytest.approx(80.0) for event in bounces)
    assert trajectories.centres[:, 0, 0].min() > 19.9
    after = trajectories.centres[int(seconds[0] * 16) + 1 : int(seconds[1] * 16), 0, 0]
    assert after.min() == pytest.approx(20.0, abs=0.3)


def test_objects_of_equal_mass_exchange_their_velocities_head_on():
    first = replace(BALL, start=(40.0, 10.0), velocity=(0.0, 20.0))
    second = replace(BALL, start=(40.0, 40.0), velocity=(0.0, -5.0))
    trajectories = simulate(replace(SCENE, objects=(first, second), has_walls=False))
    (event,) = trajectories.events
    assert (event.kind, event.objects) == ("collision", (0, 1))
    assert event.seconds == pytest.approx(22 / 25, abs=0.003)
    velocities = np.diff(trajectories.centres[-2:], axis=0)[0] * 16.0
    np.testing.assert_allclose(velocities, [[0.0, -5.0], [0.0, 20.0]], atol=1e-9)


def test_objects_of_other_depths_pass_each_other():
    first = replace(BALL, start=(40.0, 10.0), velocity=(0.0, 20.0))
    second = replace(BALL, start=(40.0, 40.0), depth=2.0)
    assert simulate(replace(SCENE, objects=(first, second), has_walls=False)).events == ()


@pytest.mark.parametrize("gravity", [0.0, 60.0])
def test_energy_is_kept_by_many_contacts(gravity):
    generator = np.random.default_rng(0)
    starts = [(15.0, 15.0), (15.0, 45.0), (40.0, 30.0)]
    objects = tuple(
        replace(BALL, start=start, radius=radius, velocity=tuple(generator.uniform(-40, 40, 2)))
        for start, radius in zip(starts, (4.0, 6.0, 8.0), strict=True)
    )
    scene = replace(SCENE, objects=objects, gravity=gravity, size=Grid(161, 80, 60))
    trajectories = simulate(scene)
    assert {event.kind for event in trajectories.events} == {"bounce", "collision"}
    assert len(trajectories.events) > 30
    energy = compute_energy(scene, trajectories)
    scale = np.abs(energy - energy.mean()).max() + sum(800 * each.radius**2 for each in objects)
    assert np.abs(energy - energy[0]).max() < 0.005 * scale
    radii = np.array([each.radius for each in objects])
    assert (trajectories.centres >= radii[:, None] - 0.5).all()
    assert (trajectories.centres <= np.array([80, 60]) - radii[:, None] + 0.5).all()


def test_momentum_is_kept_without_walls():
    first = replace(BALL, start=(40.0, 10.0), velocity=(3.0, 30.0), radius=6.0)
    second = replace(BALL, start=(44.0, 40.0), velocity=(0.0, -5.0))
    scene = replace(SCENE, objects=(first, second), has_walls=False)
    trajectories = simulate(scene)
    assert [event.kind for event in trajectories.events] == ["collision"]
    masses = np.array([36.0, 16.0])[:, None]
    momentum = (masses * np.diff(trajectories.centres, axis=0)).sum(1)
    free = np.r_[momentum[:5], momentum[-5:]]
    np.testing.assert_allclose(free, np.broadcast_to(free[0], free.shape), atol=1e-9)


def test_an_object_turns_by_its_spin():
    angles = simulate(replace(SCENE, objects=(replace(BALL, spin=1.5),))).angles[:, 0]
    np.testing.assert_allclose(angles, 1.5 * np.arange(33) / 16.0)
