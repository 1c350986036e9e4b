"""The gallery: it stays, and its clips are made again, used as inputs, copied, saved and deleted."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def open_details(studio, number=0):
    studio.page.locator("#gallery .open").nth(number).click()
    dialog = studio.page.get_by_role("dialog")
    dialog.wait_for()
    return dialog


def test_a_reload_keeps_the_gallery_and_a_stranger_does_not_see_it(studio, open_studio):
    item = studio.make_clip()
    studio.reload()
    studio.page.locator("#gallery .item-card").wait_for()
    assert [each["id"] for each in studio.items] == [item["id"]]
    studio.check_plays()
    studio.page.locator("#gallery .item-card").scroll_into_view_if_needed()
    studio.check_plays("#gallery video")
    stranger = open_studio()
    assert stranger.items == []
    assert stranger.page.locator("#gallery .item-card").count() == 0


def test_again_with_this_seed_gives_equal_frames(studio):
    first = studio.make_clip("a green triangle", seed=11)
    studio.fill("prompt", "a blue square")
    studio.fill("seed", 3)
    studio.fill_sampling("steps", 5)
    studio.page.locator("#gallery").get_by_role("button", name="Again with this seed").click()
    button = studio.page.locator("#form button[type=submit]")
    studio.page.locator(".live").get_by_text("The form is filled").wait_for()
    assert button.evaluate("(button) => button === document.activeElement")
    assert studio.field("prompt").locator("textarea").input_value() == "a green triangle"
    second = studio.generate()
    assert second["id"] != first["id"]
    assert studio.read_file(second) == studio.read_file(first)
    studio.page.locator("#stage").get_by_role("button", name="New seed").click()
    third = studio.wait_for_items(3)[0]
    assert third["title"] == "a green triangle"
    assert third["seed"] != 11
    assert studio.read_file(third) != studio.read_file(first)


def test_an_item_with_an_upload_is_made_again(studio, image_file):
    studio.select_tab("image_to_video")
    studio.upload("image", image_file)
    studio.fill_sampling("steps", 8)
    first = studio.generate()
    studio.select_tab("text_to_video")
    studio.page.locator("#gallery").get_by_role("button", name="Again with this seed").click()
    studio.field("image").locator(".chosen").get_by_text("square.png").wait_for()
    second = studio.generate()
    assert studio.read_file(second) == studio.read_file(first)


def test_a_frame_of_an_item_is_used_as_input(studio):
    first = studio.make_clip()
    studio.page.locator("#gallery").get_by_role("button", name="Use as input").click()
    studio.page.get_by_role("dialog").get_by_role("button", name="Image to video First frame").click()
    assert studio.page.locator("[role=tab][aria-selected=true]").inner_text() == "Image to video"
    slider = studio.field("image").get_by_role("slider")
    slider.fill("16")
    assert slider.get_attribute("aria-valuetext") == "Frame 17 of 17"
    studio.fill("prompt", "a red circle")
    second = studio.generate()
    assert second["values"]["image"] == {"item": first["id"], "frame": 16}


def test_the_copied_python_makes_equal_frames(studio, tmp_path, run_python, read_animation):
    item = studio.make_clip("a blue square", seed=5)
    studio.context.grant_permissions(["clipboard-read", "clipboard-write"])
    dialog = open_details(studio)
    dialog.get_by_role("button", name="Copy as command").click()
    dialog.get_by_role("button", name="Copied").wait_for()
    assert studio.page.evaluate("() => navigator.clipboard.readText()") == item["command"]
    dialog.get_by_role("button", name="Copy as Python").click()
    studio.page.wait_for_timeout(100)
    code = studio.page.evaluate("() => navigator.clipboard.readText()")
    assert code == item["python"]
    run_python(code, tmp_path)
    made, copied = map(read_animation, (studio.read_file(item), (tmp_path / "result.apng").read_bytes()))
    # The program of the other process samples one clip at once, without previews.
    assert np.abs(made.astype(int) - copied).max() <= 2


def test_copies_without_a_clipboard(open_studio):
    studio = open_studio()
    studio.context.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined });")
    studio.reload()
    item = studio.make_clip()
    dialog = open_details(studio)
    dialog.get_by_role("button", name="Copy as Python").click()
    dialog.get_by_role("button", name="Copied").wait_for()
    studio.page.keyboard.press("Escape")
    studio.field("prompt").locator("textarea").fill("")
    studio.field("prompt").locator("textarea").press("Control+v")
    assert studio.field("prompt").locator("textarea").input_value() == item["python"]


def test_details_show_the_recipe_and_files_that_can_be_saved(studio):
    item = studio.make_clip(seed=9)
    dialog = open_details(studio)
    studio.check_plays("dialog video")
    dialog.get_by_text("Recipe").click()
    assert '"seed": 9' in dialog.locator("details[open] pre").inner_text()
    for title, suffix in (("MP4", "mp4"), ("WebM", "webm"), ("GIF", "gif"), ("Lossless", "apng")):
        with studio.page.expect_download() as download:
            dialog.get_by_role("link", name=title).click()
        assert download.value.suggested_filename.endswith(suffix)
        assert download.value.path().stat().st_size > 100
    assert item["seed"] == 9


def test_an_item_is_deleted_after_a_question(studio):
    studio.make_clip("a red circle")
    studio.make_clip("a blue square")
    dialog = open_details(studio)
    dialog.get_by_role("button", name="Delete").click()
    studio.page.get_by_role("dialog", name="Delete this clip?").get_by_role("button", name="Keep").click()
    assert len(studio.items) == 2
    dialog.get_by_role("button", name="Delete").click()
    question = studio.page.get_by_role("dialog", name="Delete this clip?")
    question.get_by_role("button", name="Delete").click()
    studio.page.locator("#gallery .item-card").nth(1).wait_for(state="detached")
    assert [item["title"] for item in studio.items] == ["a red circle"]
    assert studio.page.get_by_role("dialog").count() == 0
    studio.reload()
    studio.page.locator("#gallery .item-card").wait_for()
    assert studio.page.locator("#gallery .item-card").count() == 1
