"""Text to video: previews, the clip that plays, errors that are said where they belong."""

import re

import pytest

pytestmark = pytest.mark.slow


def test_generate_gives_a_playing_video_enlarged_by_a_whole_number(studio):
    item = studio.make_clip(steps=32)
    assert (item["frames"], item["height"], item["width"], item["seed"]) == (17, 48, 32, 0)
    studio.check_plays()
    box = studio.page.locator("#stage video").bounding_box()
    assert box["width"] / 32 == box["height"] / 48 == int(box["width"] / 32) > 4
    assert "a red circle moves to the right" in studio.page.locator("#stage").inner_text()


def test_previews_steps_and_time_left_are_shown_while_sampling(studio):
    studio.start_long()
    preview = studio.page.locator("#stage img[alt^=Preview]")
    preview.wait_for()
    assert preview.evaluate("(image) => image.naturalWidth") > 0
    first = preview.get_attribute("src")
    studio.page.locator("#stage").get_by_text(re.compile(r"Step \d+ of 1000 · \d+ s left")).wait_for()
    studio.page.locator(f'#stage img[alt^=Preview]:not([src="{first}"])').wait_for()
    progress = studio.page.get_by_role("progressbar").first
    assert 0 < float(progress.evaluate("(bar) => bar.value")) < 1
    studio.page.get_by_role("button", name="Cancel").click()
    studio.page.locator("#stage").get_by_text("Cancelled").wait_for()


def test_two_clips_of_one_job_play_next_to_each_other(studio):
    studio.fill("prompt", "a blue square")
    studio.fill("count", 2)
    studio.press_generate()
    items = studio.wait_for_items(2)
    assert sorted(item["seed"] for item in items) == [0, 1]
    studio.check_plays(".cell:nth-child(1) video")
    studio.check_plays(".cell:nth-child(2) video")


def test_markup_in_a_prompt_is_a_text(studio):
    prompt = "<img src=x onerror=document.title=1> <b>bold</b>"
    studio.make_clip(prompt)
    for place in ("#stage .prompt", "#gallery .prompt"):
        assert studio.page.locator(place).first.inner_text() == prompt
    studio.page.locator("#gallery .open").first.click()
    studio.page.locator("dialog").wait_for()
    assert studio.page.locator("img[src=x], #stage b, #gallery b, dialog b").count() == 0
    assert studio.page.title() == "shapes · Studio"


def test_errors_are_said_at_their_field_which_receives_the_focus(studio):
    width = studio.field("size").get_by_label("Width")
    width.fill("33")
    studio.press_generate()
    error = studio.field("size").locator(".error")
    assert "multiple of 16" in error.inner_text()
    assert width.get_attribute("aria-invalid") == "true"
    assert width.get_attribute("aria-describedby") == error.get_attribute("id")
    assert width.evaluate("(input) => input === document.activeElement")
    width.fill("32")
    assert not error.is_visible()
    assert studio.jobs == []


def test_an_error_of_the_server_is_said_at_its_field(studio):
    studio.fill("prompt", "a red circle")
    studio.page.route("**/api/jobs", lambda route: route.fulfill(status=422, json={"error": "No.", "field": "steps"}))
    studio.press_generate()
    studio.field("steps").get_by_text("No.").wait_for()  # in the part of the form that was closed
    studio.page.unroute("**/api/jobs")
    studio.page.route("**/api/jobs", lambda route: route.abort())
    studio.press_generate()
    studio.page.locator("#form [role=alert]").get_by_text("The server does not answer").wait_for()


def test_values_and_the_tab_are_kept_over_tabs_and_a_reload(studio):
    studio.fill("prompt", "a green triangle")
    studio.fill("seed", 7)
    studio.fill_sampling("guidance", 1.5)
    studio.select_tab("loop")
    studio.fill_axis("Frames", 24)
    assert studio.page.url.endswith("#loop")
    studio.reload()
    assert studio.page.locator("[role=tab][aria-selected=true]").inner_text() == "Loop"
    assert studio.field("size").get_by_label("Frames").input_value() == "24"
    assert studio.field("prompt").locator("textarea").input_value() == "a green triangle"
    assert studio.field("seed").locator("input").input_value() == "7"
    assert "changed: guidance" in studio.page.locator("details.sampling").inner_text()
    studio.page.get_by_role("button", name="Random seed").click()
    assert studio.field("seed").locator("input").input_value() != "7"


def test_without_events_the_state_is_asked_for(open_studio):
    studio = open_studio()
    studio.page.route("**/api/events", lambda route: route.abort())
    studio.reload()
    studio.make_clip()
    studio.check_plays()


def test_a_lost_connection_is_said_until_it_is_back(studio):
    studio.page.route(re.compile("/api/(events|state)"), lambda route: route.abort())
    studio.reload()
    banner = studio.page.get_by_text("The connection to the server is lost; trying again")
    banner.wait_for()
    studio.page.unroute(re.compile("/api/(events|state)"))
    banner.wait_for(state="hidden")


def test_videos_stand_still_for_users_who_prefer_it_and_can_be_played(open_studio):
    studio = open_studio(reduced_motion="reduce")
    studio.make_clip()
    video = studio.page.locator("#stage video")
    video.wait_for()
    assert video.evaluate("(video) => video.paused && video.controls && !video.autoplay")
    assert studio.page.locator("#gallery video").count() == 0
    studio.page.get_by_role("button", name="Play all").click()
    studio.page.locator("#gallery .item-card").scroll_into_view_if_needed()  # only what is in view plays
    studio.check_plays("#gallery video")
    video.evaluate("(video) => video.play()")
    studio.check_plays()


def test_a_prompt_that_is_cut_is_said_below_the_clip(studio):
    studio.make_clip("a red circle " * 40)
    note = studio.page.locator("#stage .task-note")
    note.wait_for()
    assert "is cut to 64" in note.inner_text()
