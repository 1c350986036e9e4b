"""Browsers without a codec: VP9 in place of H.264, and a GIF in place of both."""

import pytest

pytestmark = pytest.mark.slow


def test_webm_plays_where_mp4_does_not(studio):
    studio.page.route("**/*.mp4", lambda route: route.abort())
    studio.make_clip()
    studio.check_plays()
    assert studio.page.locator("#stage video").evaluate("(video) => video.currentSrc").endswith(".webm")
    studio.page.locator("#gallery .item-card").scroll_into_view_if_needed()
    studio.check_plays("#gallery video")


def test_an_mp4_that_cannot_be_decoded_is_left_for_webm(studio):
    studio.page.route("**/*.mp4", lambda route: route.fulfill(body=b"nothing", content_type="video/mp4"))
    studio.make_clip()
    studio.check_plays()
    assert studio.page.locator("#stage video").evaluate("(video) => video.currentSrc").endswith(".webm")


def test_a_gif_is_shown_and_explained_where_neither_plays(studio):
    for kind in ("mp4", "webm"):
        studio.page.route(f"**/*.{kind}", lambda route: route.abort())
    item = studio.make_clip()
    image = studio.page.locator("#stage img")
    image.wait_for()
    assert image.get_attribute("src") == item["files"]["gif"]
    assert image.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 32
    assert "plays neither the MP4 nor the WebM file" in studio.page.locator("#stage").inner_text()
    assert studio.page.locator("#stage video").count() == 0
