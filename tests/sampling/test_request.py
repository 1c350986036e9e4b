"""Pictures of requests: how they are fitted to a clip's size, and which of them gives a clip its size."""

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.resize import compute_fitted_size
from dit_video.sampling.request import Condition, Request, fit_frames
from dit_video.tokens import Grid
from dit_video.video import Clip


def draw_disk(height: int, width: int, radius: float) -> np.ndarray:
    y, x = np.indices((height, width))
    inside = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) <= radius
    return np.where(inside, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (64, 64), (33, 200)])
@pytest.mark.parametrize(("frame_height", "frame_width"), [(32, 48), (48, 32), (96, 160)])
def test_a_disk_in_the_middle_stays_round_and_in_the_middle(height, width, frame_height, frame_width):
    radius = min(height, width) / 6
    disk = draw_disk(height, width, radius)[None]
    fitted = fit_frames(disk, Grid(9, frame_height, frame_width))[0]
    assert fitted.shape == (frame_height, frame_width, 3)
    y, x = np.nonzero(fitted[..., 0] > 127)
    scale = max(frame_height / height, frame_width / width)
    for extent in (np.ptp(y) + 1, np.ptp(x) + 1):
        assert extent == pytest.approx(2 * radius * scale, abs=1 + scale)
    assert (y.mean(), x.mean()) == pytest.approx(((frame_height - 1) / 2, (frame_width - 1) / 2), abs=1)


def test_frames_of_the_right_aspect_ratio_are_not_cropped():
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(fit_frames(frames, Grid(2, 4, 6)), frames)


@pytest.mark.parametrize(
    ("height", "width", "area", "multiple", "size"),
    [
        # Sizes by the expression in diffusers' example of WanImageToVideoPipeline, worked out by hand.
        (480, 832, 480 * 832, 16, (480, 832)),
        (1000, 1500, 480 * 832, 16, (512, 768)),
        (1500, 1000, 480 * 832, 16, (768, 512)),
        (100, 100, 720 * 1280, 16, (960, 960)),
        (10, 4000, 64 * 64, 16, (16, 1280)),
    ],
)
def test_sizes_keep_the_aspect_ratio_and_the_area(height, width, area, multiple, size):
    assert compute_fitted_size(height, width, area=area, multiple=(multiple, multiple)) == size


def test_the_first_picture_gives_the_size_and_images_of_subjects_do_not():
    image, clip = np.zeros((4, 6, 3), np.uint8), Clip(np.zeros((3, 8, 5, 3), np.uint8), 8)
    assert Request("").get_picture_size() is None
    assert Request("", reference_images=[image]).get_picture_size() is None
    assert Request("", image=image, control=clip).get_picture_size() == Grid(1, 4, 6)
    assert Request("", conditions=[Condition(content=clip)], last_image=image).get_picture_size() == Grid(3, 8, 5)


def test_pictures_are_those_that_a_request_has():
    image = np.zeros((4, 6, 3), np.uint8)
    request = Request("", image=image, conditions=[Condition(content=image, frame=8)])
    assert list(request.pictures) == ["image", "conditions"]
    request.check_pictures(("conditions", "image"))
    with pytest.raises(UserError, match="image of a request is invalid"):
        request.check_pictures(("conditions",))


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({"strength": value}, r"strength=.* above 0 and at most 1") for value in (0.0, -1.0, 1.5)),
        ({"strength": float("nan")}, "strength=nan is invalid: it must be a number"),
        ({"strength": "1"}, "strength='1' is invalid: it must be a number"),
        ({"frame": 1.5}, "frame=1.5 is invalid: it must be a whole number"),
    ],
)
def test_values_of_a_condition_that_do_not_fit_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Condition(content=np.zeros((4, 6, 3), np.uint8), **values)
