"""The mask that is painted over a clip: by mouse, by touch and by keyboard."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


@pytest.fixture
def painter(open_studio, clip_file):
    """Return the studio with a clip in the tab of inpainting, and a brush of one pixel."""
    studio = open_studio("#inpaint", has_touch=True)
    studio.upload("clip", clip_file)
    studio.page.get_by_label("Brush size").fill("1")
    return studio


def read_mask(studio) -> np.ndarray:
    """Return the painted pixels, which the browser keeps as the PNG that would be sent."""
    studio.page.wait_for_timeout(400)  # the form is stored a moment after a change
    stored = studio.page.evaluate('() => JSON.parse(sessionStorage.getItem("studio:shapes")).values.inpaint.generated')
    if stored is None:
        return np.zeros((48, 32), bool)
    with Image.open(io.BytesIO(base64.b64decode(stored["png"].partition(",")[2]))) as image:
        values = np.asarray(image.convert("L"))
    assert {*np.unique(values)} <= {0, 255}
    return values == 255


def locate(studio, x, y):
    """Return the point on the screen of the centre of a pixel of the clip."""
    canvas = studio.page.get_by_role("application")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    return box["x"] + (x + 0.5) * box["width"] / 32, box["y"] + (y + 0.5) * box["height"] / 48


def drag(studio, start, end):
    studio.page.mouse.move(*locate(studio, *start))
    studio.page.mouse.down()
    studio.page.mouse.move(*locate(studio, *end), steps=3)
    studio.page.mouse.up()


def press(studio, name):
    studio.field("generated").get_by_role("button", name=name).click()


def test_a_mask_drawn_by_mouse_is_what_is_filled_in(painter, read_animation):
    painter.field("generated").get_by_role("button", name="Rectangle").click()
    drag(painter, (20, 4), (29, 19))
    painter.fill("prompt", "a red circle")
    painter.fill_sampling("steps", 32)
    with painter.page.expect_request("**/api/jobs") as request:
        painter.press_generate()
    sent = request.value.post_data_json["values"]["generated"]["png"]
    with Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2]))) as image:
        mask = np.asarray(image.convert("L")) == 255
    expected = np.zeros((48, 32), bool)
    expected[4:20, 20:30] = True
    np.testing.assert_array_equal(mask, expected)
    (item,) = painter.wait_for_items(1)
    painter.check_plays()
    # The clip moves on the left side, which is not painted over and stays.
    frames, original = read_animation(painter.read_file(item)), read_animation(painter.read(item["inputs"][0]["url"]))
    difference = np.abs(frames.astype(int) - original).mean(axis=(0, 3))
    assert difference[:, :12].mean() < 12


def test_brush_eraser_undo_clear_and_invert(painter):
    drag(painter, (4, 10), (24, 10))
    line = read_mask(painter)
    assert line.sum() == 21
    assert line[10, 4:25].all()
    press(painter, "Eraser")
    drag(painter, (10, 10), (14, 10))
    assert read_mask(painter).sum() == 16
    press(painter, "Undo")
    np.testing.assert_array_equal(read_mask(painter), line)
    press(painter, "Invert")
    np.testing.assert_array_equal(read_mask(painter), ~line)
    press(painter, "Clear")
    assert not read_mask(painter).any()
    press(painter, "Undo")
    np.testing.assert_array_equal(read_mask(painter), ~line)
    press(painter, "Brush")
    painter.page.get_by_label("Brush size").fill("5")
    press(painter, "Clear")
    drag(painter, (16, 24), (16, 24))
    dot = read_mask(painter)
    assert dot[22:27, 16].all()
    assert dot[24, 14:19].all()
    assert dot.sum() == 21  # a disc of five pixels across


def test_a_finger_paints(painter):
    painter.page.touchscreen.tap(*locate(painter, 8, 30))
    mask = read_mask(painter)
    assert mask.sum() == 1
    assert mask[30, 8]


def test_the_keyboard_paints_and_the_place_is_said(painter):
    painter.page.get_by_role("application").focus()
    keyboard = painter.page.keyboard
    for key in ("Shift+ArrowRight", "ArrowLeft", "ArrowUp"):  # from the centre, (16, 24)
        keyboard.press(key)
    painter.page.locator(".live").get_by_text("Column 24, row 24, not painted").wait_for()
    keyboard.press("Space")
    mask = read_mask(painter)
    assert mask.sum() == 1
    assert mask[23, 23]
    keyboard.press("e")
    keyboard.press("Space")
    assert not read_mask(painter).any()
    keyboard.press("Control+z")
    assert read_mask(painter).sum() == 1


def test_a_mask_is_kept_over_a_reload_and_for_a_clip_of_the_same_size(painter, clip_file):
    drag(painter, (4, 10), (24, 10))
    line = read_mask(painter)
    painter.reload()
    painter.page.get_by_role("application").wait_for()
    painter.field("generated").get_by_text("% of the picture will be filled in").wait_for()
    np.testing.assert_array_equal(read_mask(painter), line)
    painter.upload("clip", clip_file)
    np.testing.assert_array_equal(read_mask(painter), line)


def test_nothing_painted_is_said(painter):
    painter.press_generate()
    painter.field("generated").get_by_text("Paint over what is to be filled in").wait_for()
    assert painter.jobs == []
