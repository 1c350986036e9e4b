"""Camera labels from motion vectors: of scenes with a known camera, of codecs without vectors, of shaken clips."""

import dataclasses

import numpy as np
import pytest

from dit_video.core.errors import DecodeError
from dit_video.curation.camera_motion import BlockVectors, compute_shake, label_camera, read_block_vectors, track_camera
from dit_video.scenes import CameraMotion, draw_scene, render
from dit_video.tokens import Grid
from dit_video.video import Clip, encode

LABELS = {
    "pans left": "pan left",
    "pans right": "pan right",
    "pans up": "tilt up",
    "pans down": "tilt down",
    "zooms in": "zoom in",
    "zooms out": "zoom out",
    "turns clockwise": "roll clockwise",
    "turns counterclockwise": "roll counterclockwise",
    None: "static",
}
"""Labels by the verb phrases of scenes."""
SIZES = (Grid(17, 96, 128), Grid(17, 128, 96), Grid(17, 192, 256))


def draw(index, seed):
    return draw_scene(index, seed=seed, level=3, sizes=SIZES)


def find_label(content):
    return label_camera(track_camera(*read_block_vectors(content)))


def make_vectors(velocities, *, seconds=1.0, frames=8, noise=0.0):
    """Return vectors of 8x6 blocks that move by a function of their positions."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[-0.35:0.35:6j, -0.45:0.45:8j]
    positions = np.stack([columns.ravel(), rows.ravel()], axis=1)
    times = np.repeat(np.arange(1, frames + 1) / frames * seconds, len(positions))
    positions = np.tile(positions, (frames, 1))
    moved = velocities(positions, times) + noise * generator.normal(size=positions.shape)
    return BlockVectors(times, positions, moved, np.ones(len(times)))


def test_a_similarity_is_recovered_exactly():
    def move(points, times):
        turned = np.stack([-points[:, 1], points[:, 0]], axis=1)
        return 0.2 * points + 0.3 * turned + np.array([0.05, -0.07])

    track = track_camera(make_vectors(move, frames=8))
    # The camera zooms in and turns counterclockwise, as the picture turns clockwise, and pans against the picture.
    np.testing.assert_allclose(track.motions[0], [0.2, -0.3, -0.05, -0.07], atol=1e-6)
    np.testing.assert_allclose(track.inliers, 1.0)
    assert label_camera(track) == "roll counterclockwise"


def test_an_object_over_two_fifths_of_the_picture_does_not_move_the_camera():
    def move(points, times):
        is_object = (points[:, 0] < -0.15)[:, None]
        return np.where(is_object, np.array([0.4, 0.0]), np.array([0.0, 0.06]))

    track = track_camera(make_vectors(move, noise=0.005))
    assert label_camera(track) == "tilt up"
    np.testing.assert_allclose(track.motions[:, 3], 0.06, atol=0.005)
    np.testing.assert_allclose(track.inliers, 0.625, atol=0.01)
    assert track.residuals[0] > 0.1


def test_a_camera_that_goes_to_and_fro_is_no_pan():
    def sway(points, times):
        return np.where((times < 1.1)[:, None], np.array([0.1, 0.0]), np.array([-0.1, 0.0]))

    assert label_camera(track_camera(make_vectors(sway, seconds=2.0, frames=16))) == "other"

    def shake(points, times):
        return 0.2 * np.stack([np.sin(25 * times), np.cos(21 * times)], axis=1)

    track = track_camera(make_vectors(shake, seconds=2.0, frames=32))
    assert compute_shake(track) > 0.1
    assert label_camera(track) == "handheld"


def test_nothing_is_measured_of_an_image_and_of_few_blocks():
    assert label_camera(track_camera(empty())) == ""
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3)).astype(np.uint8)
    assert find_label(encode(Clip(frames=picture, fps=1), "png")) == ""


def empty():
    return BlockVectors(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))


def test_a_file_that_is_no_video_is_refused():
    with pytest.raises(DecodeError):
        read_block_vectors(b"no video at all")


@pytest.mark.parametrize("format", ["mp4", "webm"])
@pytest.mark.parametrize("motion", ["pans left", "zooms in"])
def test_labels_of_a_codec_with_vectors_and_of_one_without(format, motion):
    scene = dataclasses.replace(draw(3, seed=7), objects=(), figure=None, occluder=None, background="grey")
    camera = {"pans left": CameraMotion(pan=(0.0, -60.0)), "zooms in": CameraMotion(zoom=1.2)}[motion]
    clip = render(dataclasses.replace(scene, size=Grid(17, 96, 128), camera=camera)).clip
    assert find_label(encode(clip, format)) == LABELS[motion]


def test_a_pan_has_its_speed_in_widths():
    scene = dataclasses.replace(draw(3, seed=7), objects=(), figure=None, occluder=None, background="grey")
    clip = render(dataclasses.replace(scene, size=Grid(25, 192, 256), camera=CameraMotion(pan=(0.0, 100.0)))).clip
    track = track_camera(*read_block_vectors(encode(clip, "mp4")))
    # The background is four times as far away as what moves by 100 pixels a second.
    np.testing.assert_allclose(np.average(track.motions[:, 2], weights=track.durations), 100 / 4 / 256, rtol=0.1)


@pytest.mark.parametrize(
    "scenes", [pytest.param(50, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.nightly)]
)
def test_nineteen_of_twenty_labels_of_scenes_are_right(scenes):
    right, count, wrong = 0, 0, []
    for index in range(scenes):
        scene = draw(index, seed=11)
        label, truth = find_label(encode(render(scene).clip, "mp4", crf=18)), LABELS[scene.camera.caption]
        right, count = right + (label == truth), count + 1
        wrong += [] if label == truth else [(index, truth, label)]
    print(f"{right} of {count} camera labels are right; wrong: {wrong}")
    assert right >= 0.95 * count


@pytest.mark.slow
def test_most_labels_of_a_few_scenes_are_right():
    scenes = [scene for index in range(30) if (scene := draw(index, seed=11)).size != SIZES[2]][:14]
    labels = [find_label(encode(render(scene).clip, "mp4", crf=18)) for scene in scenes]
    assert sum(label == LABELS[scene.camera.caption] for label, scene in zip(labels, scenes, strict=True)) >= 13
