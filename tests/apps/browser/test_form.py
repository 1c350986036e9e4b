"""The form is made from what the server says of its fields, whatever the tasks are."""

import pytest

pytestmark = pytest.mark.slow

SIZE = {"frames": 16, "height": 64, "width": 64}


def describe(name, title, kind, default, *, required=True, **more):
    """Return the description of a field."""
    return {"name": name, "title": title, "help": "", "kind": kind, "required": required, "default": default} | more


STEPS = {"frames": 8, "height": 32, "width": 32}
WAYS = [{"value": 1, "title": "one"}, {"value": 2, "title": "two"}]
CHECKPOINTS = [{"value": "", "title": "newest"}, {"value": "2000", "title": "step 2,000"}]
NEW_TAB = {
    "name": "invented",
    "title": "Invented",
    "help": "A task that these pages have never seen.",
    "note": "",
    "fields": [
        describe("words", "Words", "text", "hello", lines=1),
        describe("amount", "Amount", "number", 0.5, min=0, max=1, step=0.1, is_whole=False),
        describe("other", "Other", "number", None, min=None, max=9, step=None, is_whole=True, required=False),
        describe("share", "Share", "number", 0.5, min=None, above=0, max=1, step=0.1, is_whole=False),
        describe("way", "Way", "choice", 2, choices=WAYS),
        describe("back", "Backwards", "flag", True),
        describe("extent", "Extent", "size", SIZE, steps=STEPS, presets=[], axes=["frames", "width"], frames_offset=0),
    ],
}


@pytest.fixture
def extended(studio):
    """Return the studio of a server with one more task and one more sampling field, whose jobs are kept here."""

    def answer(route):
        model = studio.get("api/model")
        model["tabs"].append(NEW_TAB)
        model["sampling"].append(describe("checkpoint", "Checkpoint", "choice", "", choices=CHECKPOINTS))
        route.fulfill(json=model)

    studio.posted = []

    def keep(route):
        studio.posted.append(route.request.post_data_json)
        route.fulfill(status=422, json={"error": "This is not a task.", "field": None})

    studio.page.route("**/api/model", answer)
    studio.page.route("**/api/jobs", keep)
    return studio


def test_a_task_that_is_new_has_a_tab_with_all_its_fields(extended):
    extended.open("#invented")
    extended.reload()
    extended.fill("amount", 2)
    extended.press_generate()
    assert extended.field("amount").locator(".error").inner_text() == "Amount must be between 0 and 1."
    extended.fill("amount", 0.7)
    extended.fill("share", 0)
    extended.press_generate()
    assert extended.field("share").locator(".error").inner_text() == "Share must be above 0."
    assert extended.field("share").locator("input[type=range]").get_attribute("min") == "0.1"
    extended.fill("share", 0.05)
    assert extended.field("amount").locator("input[type=range]").input_value() == "0.7"
    extended.field("way").locator("select").select_option("one")
    extended.field("back").locator("input").uncheck()
    extended.field("extent").get_by_label("Frames").fill("24")
    extended.press_generate()
    extended.page.get_by_role("alert").get_by_text("This is not a task.").wait_for()
    (job,) = extended.posted
    assert job["tab"] == "invented"
    assert job["values"] == {
        "words": "hello",
        "amount": 0.7,
        "other": None,
        "share": 0.05,
        "way": 1,
        "back": False,
        "extent": {"frames": 24, "height": 64, "width": 64},
    }


def test_a_checkpoint_of_the_address_is_sampled_from(extended):
    extended.open("?checkpoint=2000")
    field = extended.field("checkpoint").locator("select")  # in the part that is opened for it
    assert field.locator("option:checked").inner_text() == "step 2,000"
    extended.fill("prompt", "a red circle")
    extended.press_generate()
    extended.page.get_by_role("alert").get_by_text("This is not a task.").wait_for()
    assert extended.posted[0]["sampling"]["checkpoint"] == "2000"
    extended.open("?checkpoint=123")
    extended.page.get_by_role("alert").get_by_text("no checkpoint 123").wait_for()


def test_the_focus_stays_where_the_user_types_while_a_file_is_sent(open_studio, clip_file):
    studio = open_studio("#extend")
    prompt = studio.field("prompt").locator("textarea")
    prompt.focus()
    studio.field("clip").locator("input[type=file]").set_input_files(clip_file)
    studio.field("clip").locator(".chosen").wait_for()
    assert prompt.evaluate("(prompt) => prompt === document.activeElement")


def test_texts_and_clips_go_along_to_other_tabs(open_studio, clip_file):
    studio = open_studio("#extend")
    studio.upload("clip", clip_file)
    studio.fill("prompt", "a blue square")
    studio.fill("frames", 12)
    studio.select_tab("interpolate")
    studio.field("clip").locator(".chosen").get_by_text("square.mp4").wait_for()
    assert studio.field("prompt").locator("textarea").input_value() == "a blue square"
    studio.select_tab("extend")
    assert studio.field("frames").locator("input").input_value() == "12"
