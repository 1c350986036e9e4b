"""The studio by keyboard alone, for screen readers, and on a phone."""

import itertools

import pytest

pytestmark = pytest.mark.slow

CONTROLS = {
    *("button", "textbox", "spinbutton", "combobox", "checkbox", "slider", "link", "tab", "searchbox", "progressbar"),
    *("image", "tabpanel", "tablist", "form", "dialog", "application", "region", "navigation", "video"),
}
"""Roles of the accessibility tree that need a name."""


def find_nameless(studio) -> list[str]:
    """Return the roles and sources of controls without a name in the accessibility tree of Chromium."""
    session = studio.context.new_cdp_session(studio.page)
    session.send("Accessibility.enable")
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    visible = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in CONTROLS]
    assert len(visible) > 10
    groups = studio.page.locator("[role=group]:not([aria-labelledby]):not([aria-label])").count()
    nameless = [node["role"]["value"] for node in visible if not node.get("name", {}).get("value", "").strip()]
    return nameless + ["group"] * groups


def list_tab_stops(studio, count):
    """Press Tab, and return the names of the elements that receive the focus."""
    names = []
    for _ in range(count):
        studio.page.keyboard.press("Tab")
        names.append(studio.page.evaluate(NAME_FOCUS))
    return names


NAME_FOCUS = """() => {
    const focus = document.activeElement;
    return focus.getAttribute("aria-label") ?? focus.labels?.[0]?.textContent ?? focus.textContent.trim();
}"""


def test_a_clip_is_made_by_keyboard_alone(studio):
    keyboard = studio.page.keyboard
    assert list_tab_stops(studio, 5) == [
        *("Skip to the content", "dit_video", "Studio", "Switch between light and dark", "Text to video"),
    ]
    keyboard.press("ArrowRight")
    assert studio.page.locator("[role=tab][aria-selected=true]").inner_text() == "Image to video"
    keyboard.press("End")
    assert studio.page.locator("[role=tab][aria-selected=true]").inner_text() == "Vary"
    keyboard.press("ArrowRight")  # around
    assert studio.page.locator("[role=tab][aria-selected=true]").inner_text() == "Text to video"
    assert list_tab_stops(studio, 1) == ["Prompt"]
    keyboard.type("a red circle")
    keyboard.press("Control+Enter")
    studio.wait_for_items(1)
    studio.page.locator(".live").get_by_text("Done: a red circle").wait_for()
    assert studio.page.evaluate(NAME_FOCUS) == "Prompt"  # nothing has taken the focus
    for _ in range(40):
        if list_tab_stops(studio, 1) == ["Details"]:
            break
    keyboard.press("Enter")
    studio.page.get_by_role("dialog", name="a red circle").wait_for()
    keyboard.press("Escape")
    assert studio.page.get_by_role("dialog").count() == 0
    assert studio.page.evaluate(NAME_FOCUS) == "Details"


def test_the_focus_is_seen_and_never_behind_the_button(open_studio):
    studio = open_studio("#described_edit", viewport={"width": 1280, "height": 620})
    studio.page.locator("#tab-described_edit").focus()
    for _ in range(20):
        studio.page.keyboard.press("Tab")
        box, style = studio.page.evaluate("""() => {
            const focus = document.activeElement, box = focus.getBoundingClientRect();
            const seen = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            return [focus === seen || focus.contains(seen), getComputedStyle(focus).outlineStyle];
        }""")
        name = studio.page.evaluate(NAME_FOCUS)
        assert box, f"{name} is hidden"
        assert style != "none", f"the focus of {name} is not seen"
        if "Generate" in name:
            return
    pytest.fail("the button was not reached")


def test_every_control_has_a_name(studio, clip_file):
    studio.make_clip()
    studio.select_tab("inpaint")
    studio.upload("clip", clip_file)
    studio.page.locator("details.sampling").evaluate("(details) => { details.open = true; }")
    for name in studio.list_tabs():
        studio.select_tab(name)
        assert find_nameless(studio) == [], name
    studio.page.locator("#gallery .open").click()
    studio.page.get_by_role("dialog").wait_for()
    assert find_nameless(studio) == []


def test_headings_and_landmarks_are_in_order(studio):
    studio.make_clip()
    levels = [
        int(heading.evaluate("(heading) => heading.tagName.slice(1)"))
        for heading in studio.page.locator("h1, h2, h3, h4").all()
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert studio.page.locator("html").get_attribute("lang") == "en"
    for role in ("main", "navigation", "form"):
        assert studio.page.get_by_role(role).count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(open_studio, scheme):
    studio = open_studio(color_scheme=scheme)
    studio.make_clip()
    studio.fill_axis("Width", 33)
    studio.press_generate()
    pairs = studio.page.evaluate(READ_COLOURS)
    assert len(pairs) > 30
    low = {f"{text}: {compute_contrast(*colours):.2f}" for text, *colours in pairs if compute_contrast(*colours) < 4.5}
    assert low == set()


READ_COLOURS = """() => {
    const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const blend = (colours) => {
        paint.clearRect(0, 0, 1, 1);
        for (const colour of colours) {
            paint.fillStyle = colour;
            paint.fillRect(0, 0, 1, 1);
        }
        return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const grounds = (element) =>
        element ? [...grounds(element.parentElement), getComputedStyle(element).backgroundColor] : ["white"];
    const texts = [...document.querySelectorAll("body *")].filter((element) =>
        element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
    return texts.map((element) => {
        const ground = grounds(element);
        const colours = [blend([...ground, getComputedStyle(element).color]), blend(ground)];
        return [element.textContent.trim().slice(0, 30), ...colours];
    });
}"""


def compute_contrast(first, second) -> float:
    """Return the contrast ratio of two sRGB colours (WCAG 2.2)."""

    def luminance(colour):
        linear = [c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for value in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_a_phone_scrolls_only_downwards(open_studio, clip_file):
    studio = open_studio(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    studio.make_clip("a prompt with averyveryveryveryveryveryveryveryveryveryveryveryveryveryverylong word")
    studio.check_plays()
    video = studio.page.locator("#stage video").bounding_box()
    assert 0 <= video["y"] <= 844 - video["height"]  # the form has made place for it
    studio.select_tab("inpaint")
    studio.upload("clip", clip_file)
    for name in studio.list_tabs():
        studio.select_tab(name)
        assert read_widths(studio) == (390, 390), name
    studio.page.locator("#gallery .open").click()
    studio.page.get_by_role("dialog").wait_for()
    for details in studio.page.locator("dialog summary").all():
        details.click()
    assert studio.page.get_by_role("dialog").evaluate("(dialog) => dialog.scrollWidth <= dialog.clientWidth")
    assert read_widths(studio) == (390, 390)


def read_widths(studio):
    return tuple(studio.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]"))
