"""Every tab makes a clip that plays, from uploads and from items of the gallery."""

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def context(browser):
    """Return the browser of one user, who makes two clips and then uses all tabs."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    yield context
    context.close()


@pytest.fixture(scope="module")
def studio(context, address, make_studio):
    """Return the studio of that user, with two clips in the gallery."""
    studio = make_studio(context)
    studio.make_clip("a red circle moves to the right")
    studio.make_clip("a blue square moves up", seed=1)
    return studio


def paint(studio):
    canvas = studio.page.get_by_role("application")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    studio.page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    studio.page.mouse.down()
    studio.page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.2 * box["height"], steps=4)
    studio.page.mouse.up()


def add_image(studio):
    studio.field("conditions").get_by_role("button", name="Add an image").click()


TABS = {
    "text_to_video": lambda s, clip, image: None,
    "image_to_video": lambda s, clip, image: s.upload("image", image),
    "first_and_last_frame": lambda s, clip, image: (s.upload("image", image), s.pick("last_image")),
    "keyframes": lambda s, clip, image: (add_image(s), s.upload("conditions-image", image)),
    "extend": lambda s, clip, image: s.pick("clip"),
    "blend": lambda s, clip, image: (s.pick("first", 0), s.pick("second", 1)),
    "interpolate": lambda s, clip, image: s.upload("clip", clip),
    "loop": lambda s, clip, image: None,
    "inpaint": lambda s, clip, image: (s.upload("clip", clip), paint(s)),
    "outpaint": lambda s, clip, image: (s.fill_axis("Width", 48), s.fill_axis("Height", 64), s.pick("clip", 1)),
    "zoom_out": lambda s, clip, image: (s.upload("image", image), s.fill("frames", 4)),
    "edit": lambda s, clip, image: s.pick("clip"),
    "described_edit": lambda s, clip, image: (s.upload("clip", clip), s.fill("source", "a blue square")),
    "vary": lambda s, clip, image: s.upload("clip", clip),
}
"""Tabs of the model, with functions that fill what has no default."""


def test_the_tabs_are_those_of_the_model(studio):
    assert [tab["name"] for tab in studio.get("api/model")["tabs"]] == [*TABS] == studio.list_tabs()


@pytest.mark.parametrize("name", TABS)
def test_a_tab_makes_a_clip_that_plays(studio, name, clip_file, image_file):
    studio.select_tab(name)
    studio.fill("prompt", "a green triangle moves to the left")
    for field in studio.page.locator(f"#panel-{name}").get_by_role("button", name="Remove").all():
        field.click()
    TABS[name](studio, clip_file, image_file)
    studio.fill_sampling("steps", 8)
    item = studio.generate()
    assert item["tab"] == name
    studio.page.locator(f'#stage video[poster*="{item["id"]}"]').wait_for()
    studio.check_plays()
