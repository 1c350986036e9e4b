"""Actions of frames: from files of training clips and from requests, as latents have them."""

import numpy as np
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.models.autoencoders import PatchVaeConfig
from dit_video.models.conditioning import ClipView, FrameActions
from dit_video.tokens import Grid

ACTIONS = np.arange(60, dtype=np.float32).reshape(30, 2)
VIEW = ClipView(
    name="clips/a.mp4",
    frames=np.zeros((9, 8, 8, 3), np.uint8),
    fps=8.0,
    frame_stride=2.0,
    latents=Grid(3, 1, 1),
    stride=Grid(4, 8, 8),
    start=3,
)


class Codec:
    config = PatchVaeConfig(stride=Grid(4, 8, 8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.mp4.npy", ACTIONS)
    return str(tmp_path)


def test_actions_of_the_files_frames_are_means_over_those_of_each_latent(folder):
    values = FrameActions(folder=folder).from_clip(VIEW)
    expected = [ACTIONS[6], ACTIONS[8:15:2].mean(axis=0), ACTIONS[16:23:2].mean(axis=0)]
    np.testing.assert_allclose(values, expected)
    config = FrameActions(folder=folder, per_latent=4)
    every = config.from_clip(VIEW)
    assert every.shape == config.field.get_shape(VIEW.latents) == (3, 8)
    np.testing.assert_allclose(every[1].reshape(4, 2), ACTIONS[8:15:2])
    np.testing.assert_allclose(every[0].reshape(4, 2), np.tile(ACTIONS[6], (4, 1)))


def test_a_request_of_the_same_actions_has_the_same_values(folder):
    config = FrameActions(folder=folder, per_latent=2).use_codec(Codec())
    given = ACTIONS[6:23:2].tolist()
    for actions in (given, [*given, [9, 9]]):  # later ones are left out
        np.testing.assert_array_equal(config.from_request(actions, VIEW.latents), config.from_clip(VIEW))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((8, 2)), r"actions of shape \[8, 2\] are invalid: they must be finite numbers \[9, 2\]"),
        (np.zeros(9), r"actions of shape \[9\] are invalid"),
        (np.full((9, 2), np.nan), "must be finite numbers"),
        (np.zeros((9, 3)), r"size=2 is invalid: there are actions of 3 numbers\. Use these"),
    ],
)
def test_actions_that_do_not_fit_the_clip_are_refused(actions, message):
    with pytest.raises(UserError, match=message):
        FrameActions().use_codec(Codec()).from_request(actions, VIEW.latents)


def test_training_clips_without_their_actions_are_refused(folder, tmp_path):
    config = FrameActions(folder=folder)
    with pytest.raises(MissingError, match=r"b\.mp4\.npy does not exist\. Name the folder of the actions"):
        config.from_clip(VIEW._replace(name="clips/b.mp4"))
    with pytest.raises(MissingError, match=r"folder='', and the actions of clips/a\.mp4, does not exist"):
        FrameActions().from_clip(VIEW)
    with pytest.raises(UserError, match="flips=True is invalid with actions"):
        config.from_clip(VIEW._replace(is_flipped=True))
    with pytest.raises(UserError, match=r"the clip has 39 frames or more, and the file actions of shape \[30, 2\]"):
        config.from_clip(VIEW._replace(start=11))
    with pytest.raises(UserError, match=r"per_latent=3 is invalid: a latent has 4 frames\. Use a divisor"):
        FrameActions(folder=folder, per_latent=3).from_clip(VIEW)
