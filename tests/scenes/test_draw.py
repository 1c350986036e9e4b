"""Random scenes: what their captions say is true, and they are a function of seed, level and number."""

from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.scenes import draw_scene, render, simulate
from dit_video.scenes.draw import ACTION_PIXELS, draw_loop, draw_steered
from dit_video.scenes.folder import get_actions
from dit_video.scenes.scene import DIRECTIONS, RELATIONS
from dit_video.tokens import Grid

SIZES = (Grid(17, 48, 64),)


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2, 3])
def test_there_are_more_than_a_thousand_captions(level):
    # Level 3 finds contacts by simulation, which pictures do not need.
    options = {"sizes": (Grid(1, 48, 48),)} if level == 3 else {}
    captions = {draw_scene(index, seed=0, level=level, **options).caption for index in range(1500)}
    assert len(captions) > 1000
    assert all(caption.startswith(("a ", "two objects, ", "three objects, ")) for caption in captions)


def test_a_scene_is_a_function_of_its_arguments():
    scene = draw_scene(5, seed=1, level=3)
    assert scene == draw_scene(5, seed=1, level=3)
    others = [draw_scene(6, seed=1, level=3), draw_scene(5, seed=2, level=3), draw_scene(5, seed=1, level=2)]
    assert scene not in others


@pytest.mark.parametrize("frames", [17, 33])
@pytest.mark.parametrize("level", [1, 2])
def test_objects_move_as_their_caption_says_and_stay_in_the_frame(level, frames):
    for index in range(30):
        scene = draw_scene(index, seed=3, level=level, sizes=(SIZES[0]._replace(t=frames),))
        trajectories = simulate(scene)
        assert trajectories.events == ()
        for number, each in enumerate(scene.objects):
            centres = trajectories.centres[:, number]
            radius = each.radius - 1e-6
            assert (centres >= radius).all()
            assert (centres <= np.array([48, 64]) - radius).all()
            moved = centres[-1] - centres[0]
            expected = np.array((0, 0) if each.direction is None else DIRECTIONS[each.direction])
            assert np.sign(np.round(moved, 6)).tolist() == expected.tolist()
            assert each.phrase in scene.caption
            if each.direction is not None:
                shares = np.abs(moved).sum() / ((frames - 1) / scene.fps) / 48
                assert (shares > 0.2) == (each.speed == "quickly")
                assert f"{each.phrase} moving {each.direction} {each.speed}" in scene.caption


def test_two_objects_have_the_relation_of_the_caption_and_other_colours():
    seen = set()
    for index in range(80):
        scene = draw_scene(index, seed=4, level=2, sizes=SIZES)
        first, second = scene.objects
        axis, sign = RELATIONS[scene.relation]
        offset = np.subtract(second.start, first.start)
        assert sign * offset[axis] > first.radius + second.radius
        assert f" {scene.relation} {second.phrase}" in scene.caption
        assert first.colour != second.colour
        seen.add(scene.relation)
    assert seen == set(RELATIONS)


def test_captions_of_level_3_tell_of_contacts_figures_posts_and_the_camera():
    scenes = [draw_scene(index, seed=5, level=3, sizes=SIZES) for index in range(40)]
    for scene in scenes:
        kinds = {event.kind for event in simulate(scene).events}
        assert ("bounce" in scene.caption) == ("bounce" in kinds)
        assert ("collide" in scene.caption) == ("collision" in kinds)
        assert (" fall" in scene.caption) == (scene.gravity > 0)
        assert ("stick figure that" in scene.caption) == (scene.figure is not None)
        assert ("post" in scene.caption) == (scene.occluder is not None)
        assert ("while the camera" in scene.caption) == (scene.camera.caption is not None)
    for has in (
        lambda scene: scene.gravity > 0,
        lambda scene: scene.figure is not None,
        lambda scene: scene.occluder is not None,
        lambda scene: scene.camera.caption is not None,
    ):
        assert 0.15 < np.mean([has(scene) for scene in scenes]) < 0.8


def test_pictures_of_one_frame_have_no_motion_in_their_caption():
    for level in (1, 2, 3):
        scene = draw_scene(0, seed=0, level=level, sizes=(Grid(1, 48, 48),))
        assert not any(word in scene.caption for word in ("moving", "still", "that", "camera", "bounce"))
    still = replace(draw_scene(0, seed=0, level=1, sizes=SIZES).objects[0], direction=None)
    assert still.phrase.startswith("a ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": 4}, r"level=4 is invalid: .* Use 1, 2 or 3"),
        ({"sizes": ()}, r"sizes=\[\] are invalid: .* Use larger sizes"),
        ({"sizes": (Grid(1, 16, 48),)}, r"sizes=\['1x16x48'\] are invalid: .* at least 24 pixels"),
    ],
)
def test_scenes_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        draw_scene(0, **({"seed": 0, "level": 1} | arguments))


def test_the_last_frame_of_a_loop_is_its_first_and_its_object_moves_evenly_as_the_caption_says():
    seen = set()
    for index in range(20):
        scene = draw_loop(index, seed=1, sizes=(Grid(9, 32, 48),))
        assert scene == draw_loop(index, seed=1, sizes=(Grid(9, 32, 48),))
        rendered, (each,) = render(scene), scene.objects
        assert f"{each.phrase} moving {each.direction}, in a loop, in front of" in scene.caption
        np.testing.assert_array_equal(rendered.clip.frames[0], rendered.clip.frames[-1])
        steps = np.diff(rendered.centres[:, 0], axis=0)
        expected = np.multiply(DIRECTIONS[each.direction], (32 / 8, 48 / 8))
        np.testing.assert_allclose(steps, np.broadcast_to(expected, steps.shape), atol=1e-3)
        areas = (rendered.instances == 1).sum(axis=(1, 2))
        assert areas.max() < 1.25 * areas.min()  # what leaves the frame comes in at the other side
        seen.add(each.direction)
    assert len(seen) == 4
    with pytest.raises(UserError, match="a loop has several frames"):
        draw_loop(0, seed=1, sizes=(Grid(1, 32, 48),))


def test_actions_move_an_object_as_far_as_the_borders_let_it():
    scenes = [draw_steered(index, seed=1, sizes=SIZES) for index in range(12)]
    assert scenes == [draw_steered(index, seed=1, sizes=SIZES) for index in range(12)]
    assert len({action for scene in scenes for action in scene.actions}) == 5
    stopped = 0
    for scene in scenes:
        rendered, (each,) = render(scene), scene.objects
        assert f"{each.phrase}, steered, in front of" in scene.caption
        assert len(scene.actions) == scene.size.t - 1
        steps = np.diff(rendered.centres[:, 0], axis=0)
        is_free = np.isclose(steps, scene.actions, atol=1e-3).all(axis=1)
        at_border = np.isclose(rendered.centres[1:, 0], each.radius, atol=1e-3) | np.isclose(
            rendered.centres[1:, 0], np.array(scene.size[1:]) - each.radius, atol=1e-3
        )
        assert (is_free | at_border.any(axis=1)).all()
        stopped += (~is_free).sum()
        actions = get_actions(scene)
        np.testing.assert_allclose(actions[1:] * ACTION_PIXELS, scene.actions)
        assert not actions[0].any()
    assert stopped > 0
