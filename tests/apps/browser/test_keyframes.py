"""The field of keyframes: several images, each with its frame and its strength."""

import pytest

pytestmark = pytest.mark.slow


def test_a_clip_shows_images_at_their_frames(studio, image_file, read_animation):
    studio.select_tab("keyframes")
    studio.fill("prompt", "a red square")
    field = studio.field("conditions")
    inputs = field.locator("input[type=file]")
    inputs.nth(0).set_input_files(image_file)
    field.locator(".entry .chosen").first.wait_for()
    field.get_by_role("button", name="Add an image").click()
    inputs.nth(1).set_input_files(image_file)
    field.locator(".entry .chosen").nth(1).wait_for()
    field.get_by_label("At frame").nth(1).fill("17")
    field.get_by_label("Strength").nth(1).fill("0.9")
    item = studio.generate()
    assert [(each["at"], each.get("strength")) for each in item["values"]["conditions"]] == [(0, 1), (16, 0.9)]
    assert {each["name"] for each in item["inputs"]} == {"conditions_1.png", "conditions_2.png"}
    first = read_animation(studio.read_file(item))[0].astype(int)
    assert (first[10:18, 10:18, 0] > first[10:18, 10:18, 2] + 60).all()  # the red square of the image
    studio.reload()
    field = studio.field("conditions")
    field.locator(".entry .chosen").nth(1).wait_for()
    assert field.get_by_label("At frame").nth(1).input_value() == "17"
    field.get_by_role("button", name="Remove: Image 2").click()
    assert field.locator(".entry").count() == 1
    field.get_by_label("At frame").fill("0")
    studio.press_generate()
    field.get_by_text("A frame is a whole number from 1.").wait_for()
