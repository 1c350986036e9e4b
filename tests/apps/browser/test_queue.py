"""Jobs of several users: fair order, cancelling, and users who leave."""

import re

import pytest

pytestmark = pytest.mark.slow


def queue_behind_long(studio):
    """Start a clip of many steps, and a blue square of few steps that waits for it."""
    studio.start_long()
    studio.page.locator("#stage").get_by_text(re.compile("Step")).wait_for()
    studio.fill("prompt", "a blue square")
    studio.fill_sampling("steps", 8)
    studio.press_generate()
    studio.page.locator("#queue").get_by_text(re.compile("Waiting")).wait_for()


def test_cancel_frees_the_queue(studio):
    queue_behind_long(studio)
    studio.page.locator("#stage").get_by_role("button", name="Cancel").click()
    (item,) = studio.wait_for_items(1)
    assert item["title"] == "a blue square"
    studio.check_plays()
    assert not studio.page.locator("#queue").is_visible()
    assert not studio.has_active_jobs


def test_a_clip_that_is_done_before_it_was_seen_to_run_comes_into_view(studio):
    studio.page.route("**/api/events", lambda route: route.abort())  # the page asks for the state instead
    studio.reload()
    queue_behind_long(studio)
    studio.page.route("**/api/state", lambda route: route.abort())
    studio.page.locator("#connection").wait_for()
    studio.cancel(studio.jobs[0])
    studio.wait_until_idle()
    studio.page.unroute("**/api/state")
    studio.page.locator("#stage").get_by_text("a blue square").wait_for()
    studio.check_plays()


def test_a_waiting_job_is_cancelled_in_the_list(studio):
    studio.start_long()
    studio.page.locator("#stage").get_by_text(re.compile("Step")).wait_for()
    studio.fill("prompt", "a blue square")
    studio.press_generate()
    studio.page.locator("#queue").get_by_role("button", name="Cancel: a blue square").click()
    studio.page.locator("#queue").wait_for(state="hidden")
    assert studio.page.locator("#stage").get_by_text(re.compile("Step")).is_visible()
    studio.page.locator("#stage").get_by_role("button", name="Cancel").click()
    studio.page.locator("#stage").get_by_text("Cancelled").wait_for()
    assert studio.items == []


def test_two_users_at_once_both_finish_and_see_only_their_own(open_studio):
    users = {"a red circle": open_studio(), "a blue square": open_studio()}
    for prompt, user in users.items():
        user.fill("prompt", prompt)
        user.fill_sampling("steps", 60)
    for user in users.values():
        user.press_generate()
        user.press_generate()
    for prompt, user in users.items():
        items = user.wait_for_items(2)
        assert [item["title"] for item in items] == [prompt, prompt]
        user.check_plays()
    # Users take turns: the first one's second clip is not made before the other's first one.
    first, second = ([item["created"] for item in user.items][::-1] for user in users.values())
    assert second[0] < first[1]


def test_a_user_who_leaves_holds_up_nobody_and_comes_back_to_the_clip(open_studio, browser, address):
    leaver, other = open_studio(), open_studio()
    leaver.fill_sampling("steps", 150)
    leaver.fill("prompt", "a red circle")
    leaver.press_generate()
    leaver.page.locator("#stage").get_by_text(re.compile("Step")).wait_for()
    leaver.page.close()
    other.make_clip("a blue square")
    other.check_plays()
    leaver.page = leaver.context.new_page()
    leaver.open()
    (item,) = leaver.wait_for_items(1)
    assert item["title"] == "a red circle"
    leaver.check_plays()


def test_a_full_queue_is_said(studio):
    limit = studio.get("api/model")["limits"]["jobs"]
    studio.start_long()
    for _ in range(limit):
        studio.press_generate()
        studio.page.wait_for_timeout(50)
    studio.page.locator("#form [role=alert]").wait_for()
    assert str(limit) in studio.page.locator("#form [role=alert]").inner_text()
    for job in studio.jobs:
        studio.cancel(job)
    studio.page.locator("#stage").get_by_text("Cancelled").wait_for()
    assert not studio.has_active_jobs
