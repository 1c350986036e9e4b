"""Rendered scenes: their truth agrees with their pixels."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import map_coordinates, maximum_filter, minimum_filter

from dit_video.core.errors import UserError
from dit_video.scenes import CameraMotion, Occluder, Scene, SceneObject, StickFigure, draw_scene, render, simulate
from dit_video.scenes.render import BACKGROUND_DEPTH, JOINTS, LIMBS, compute_joints
from dit_video.tokens import Grid

SIZE = Grid(9, 64, 80)
BALL = SceneObject(
    colour="red", texture="striped", shape="circle", size="large", radius=10.0, start=(30.0, 25.0), velocity=(8.0, 24.0)
)
SCENE = Scene(level=1, size=SIZE, fps=8.0, background="navy", objects=(BALL,))


def compute_warping_psnr(rendered, flow, *, instances_counted=range(10)):
    """Return the PSNR of frames that are sampled from the next ones at the ends of a flow, away from edges.

    Also return the share of pixels that it is about, which are those of some instances.
    """
    frames, instances = rendered.clip.frames.astype(float), rendered.instances
    size = (1, 3, 3)
    is_flat = maximum_filter(instances, size) == minimum_filter(instances, size)
    errors, count = 0.0, 0
    rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
    for index in range(len(flow)):
        target = [rows + flow[index, ..., 0], columns + flow[index, ..., 1]]
        is_kept = rendered.is_visible[index] & is_flat[index] & np.isin(instances[index], instances_counted)
        # Pixels at the border of the next frame have neighbours outside of it, those at an edge another part's.
        nearest = np.clip(np.rint(target), 0, [[[frames.shape[1] - 1]], [[frames.shape[2] - 1]]]).astype(int)
        is_kept &= is_flat[index + 1][tuple(nearest)]
        is_kept &= (target[0] >= 0) & (target[0] <= frames.shape[1] - 1)
        is_kept &= (target[1] >= 0) & (target[1] <= frames.shape[2] - 1)
        warped = np.stack([map_coordinates(frames[index + 1, ..., c], target, order=1) for c in range(3)], -1)
        errors += ((warped - frames[index]) ** 2)[is_kept].sum()
        count += 3 * is_kept.sum()
    return 10 * np.log10(255**2 * count / max(errors, 1e-9)), count / 3 / rendered.is_visible.size


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_frames_are_the_next_ones_moved_by_the_flow(level, seed):
    scene = draw_scene(seed, seed=7, level=level, sizes=(SIZE,))
    rendered = render(scene)
    psnr, share = compute_warping_psnr(rendered, rendered.flow)
    assert psnr >= 35
    assert share > 0.6


def test_a_wrong_flow_is_seen():
    rendered = render(SCENE)
    flow = rendered.flow
    assert compute_warping_psnr(rendered, flow, instances_counted=[1])[0] >= 35
    for wrong in (np.zeros_like(flow), -flow, flow[..., ::-1], flow + 0.5):
        assert compute_warping_psnr(rendered, wrong, instances_counted=[1])[0] < 33


@pytest.mark.parametrize("shape", ["circle", "square", "ring", "cross"])
def test_the_mask_of_an_object_is_around_its_centre(shape):
    rendered = render(replace(SCENE, objects=(replace(BALL, shape=shape, spin=1.0),)))
    for frame, instances in enumerate(rendered.instances):
        centroid = np.argwhere(instances == 1).mean(0) + 0.5
        np.testing.assert_allclose(centroid, rendered.centres[frame, 0], atol=0.5)
    np.testing.assert_allclose(rendered.centres[:, 0], simulate(SCENE).centres[:, 0], atol=1e-4)


def test_nearer_parts_hide_others_and_depth_says_so():
    near = replace(BALL, colour="blue", texture="plain", start=(30.0, 40.0), velocity=(0.0, 0.0), depth=0.8)
    post = Occluder(column=60.0, half_width=5.0)
    rendered = render(replace(SCENE, objects=(BALL, near), occluder=post))
    assert set(np.unique(rendered.depth)) == {np.float32(each) for each in (0.5, 0.8, 1.0, BACKGROUND_DEPTH)}
    for depth, instance in ((0.5, 3), (0.8, 2), (1.0, 1), (BACKGROUND_DEPTH, 0)):
        np.testing.assert_array_equal(rendered.depth == np.float32(depth), rendered.instances == instance)
    assert (rendered.instances[0, :, 60] == 3).all()
    assert rendered.instances[0, 30, 40] == 2
    # The far object passes behind the near one, and its points are then not visible.
    hidden = ~rendered.is_visible & (rendered.instances[:-1] == 1)
    assert hidden.any()
    assert (rendered.is_visible[:, 2:-2, 2:8]).all()


def test_the_camera_moves_what_is_far_less():
    still = replace(BALL, velocity=(0.0, 0.0))
    pan = CameraMotion(caption="pans left", pan=(0.0, -16.0))
    rendered = render(replace(SCENE, objects=(still, replace(still, depth=2.0, start=(30.0, 55.0))), camera=pan))
    moved = rendered.centres[-1] - rendered.centres[0]
    np.testing.assert_allclose(moved, [[0.0, 16.0], [0.0, 8.0]], atol=1e-4)
    background = rendered.flow[rendered.instances[:-1] == 0]
    np.testing.assert_allclose(
        background, np.broadcast_to([0.0, 16 / 8 / BACKGROUND_DEPTH], background.shape), atol=1e-5
    )
    np.testing.assert_allclose(
        rendered.camera.apply(np.tile([[30.0, 25.0]], (9, 1))), rendered.centres[:, 0], atol=1e-4
    )


@pytest.mark.parametrize(
    ("camera", "start", "end"),
    [
        (CameraMotion(zoom=1.5), (32.0, 50.0), (32.0, 55.0)),
        (CameraMotion(turn=np.pi / 2), (52.0, 40.0), (32.0, 60.0)),
    ],
)
def test_zoom_and_turn_are_about_the_centre_of_the_frame(camera, start, end):
    still = replace(BALL, velocity=(0.0, 0.0), start=start)
    rendered = render(replace(SCENE, objects=(still,), camera=camera))
    np.testing.assert_allclose(rendered.centres[-1, 0], end, atol=1e-3)
    area = (rendered.instances == 1).sum((1, 2))
    assert area[-1] / area[0] == pytest.approx(camera.zoom**2, rel=0.05)


@pytest.mark.parametrize("action", ["waves", "walks left", "walks right", "jumps"])
def test_a_figure_moves_its_joints_and_keeps_its_limbs(action):
    figure = StickFigure(action=action, colour="white", height=40.0, start=(60.0, 40.0))
    scene = replace(SCENE, size=Grid(17, 64, 80), objects=(), figure=figure)
    joints = compute_joints(figure, scene)
    assert joints.shape == (17, len(JOINTS), 2)
    for first, second in LIMBS:
        lengths = np.hypot(*(joints[:, second] - joints[:, first]).T)
        np.testing.assert_allclose(lengths, lengths[0], rtol=1e-9)
    assert np.abs(np.diff(joints, axis=0)).max() > 0.5
    drift = joints[-1, JOINTS.index("hips"), 1] - joints[0, JOINTS.index("hips"), 1]
    assert np.sign(round(drift)) == {"walks left": -1, "walks right": 1}.get(action, 0)
    rendered = render(scene)
    np.testing.assert_allclose(rendered.poses, joints, atol=1e-4)
    rows, columns = np.floor(rendered.poses).astype(int).transpose(2, 0, 1)
    is_inside = (rows >= 0) & (rows < 64) & (columns >= 0) & (columns < 80)
    frames = np.broadcast_to(np.arange(17)[:, None], rows.shape)
    assert (rendered.instances[frames[is_inside], rows[is_inside], columns[is_inside]] == 1).mean() > 0.95


def test_a_tone_begins_with_each_contact():
    scene = replace(SCENE, size=Grid(33, 64, 80), objects=(replace(BALL, velocity=(0.0, 60.0)),))
    rendered = render(scene)
    assert rendered.sound.shape == (33 * 2000,)
    assert len(rendered.events) >= 2
    first = rendered.events[0]
    start = round(first.seconds * rendered.sample_rate)
    assert not rendered.sound[: start + 1].any()
    assert np.abs(rendered.sound[start : start + 400]).max() > 0.2
    assert np.abs(rendered.sound).max() <= 1
    assert not render(replace(SCENE, objects=())).sound.any()


def test_a_scene_without_motion_is_the_same_in_all_frames():
    rendered = render(replace(SCENE, objects=(replace(BALL, velocity=(0.0, 0.0)),)))
    assert (rendered.clip.frames == rendered.clip.frames[:1]).all()
    np.testing.assert_allclose(rendered.flow, 0, atol=1e-5)
    assert rendered.is_visible.all()


def test_shapes_and_textures_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="shape='star' is invalid"):
        render(replace(SCENE, objects=(replace(BALL, shape="star"),)))
    with pytest.raises(UserError, match="texture='furry' is invalid"):
        render(replace(SCENE, objects=(replace(BALL, texture="furry"),)))
