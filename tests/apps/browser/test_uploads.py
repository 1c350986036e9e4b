"""Uploads: what cannot be used is said in the page, and the form can be used on."""

import base64
import struct
import zlib

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def extender(open_studio):
    """Return the studio with the tab that extends a clip."""
    return open_studio("#extend")


def choose(studio, path, field="clip"):
    studio.field(field).locator("input[type=file]").set_input_files(path)


def read_error(studio, field="clip"):
    """Wait for the error of a field, which a screen reader reads with it, and return it."""
    error = studio.field(field).locator(".error")
    error.wait_for()
    assert error.get_attribute("id") in studio.field(field).get_attribute("aria-describedby")
    assert studio.field(field).get_by_role("button", name="Choose a file").is_visible()
    return error.inner_text()


def write_large_png(path, side):
    """Write a PNG of side × side black pixels of one bit, which is small as a file."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    row = bytes(1 + -(-side // 8))
    pixels = b"".join([*(packer.compress(row * 100) for _ in range(side // 100)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_an_upload_is_shown_with_its_first_frame_and_how_it_was_changed(extender, clip_file):
    extender.upload("clip", clip_file)
    chosen = extender.field("clip").locator(".chosen")
    assert "square.mp4" in chosen.inner_text()
    assert "32×48, 17 frames" in chosen.inner_text()
    assert "64×96" in chosen.locator(".note").inner_text().replace(" ", "")  # the size that it was resized from
    assert chosen.locator("img").evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [32, 48]
    extender.reload()
    extender.field("clip").locator(".chosen").get_by_text("square.mp4").wait_for()
    extender.field("clip").get_by_role("button", name="Remove").click()
    extender.field("clip").get_by_text("Drop a clip here").wait_for()


@pytest.mark.parametrize("name", ["notes.txt", "notes.mp4"])
def test_a_text_is_refused_under_any_name(extender, tmp_path, name):
    path = tmp_path / name
    path.write_text("Not a video. " * 100)
    choose(extender, path)
    error = read_error(extender)
    assert name in error
    assert "Traceback" not in error
    extender.select_tab("image_to_video")
    choose(extender, path, "image")
    assert name in read_error(extender, "image")


def test_a_truncated_video_is_refused_or_used_as_far_as_it_goes(extender, clip_file, tmp_path):
    path = tmp_path / "half.mp4"
    content = clip_file.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    choose(extender, path)
    extender.field("clip").locator(".error:visible, .chosen").first.wait_for()
    if extender.field("clip").locator(".error").is_visible():
        assert "half.mp4" in read_error(extender)
    assert extender.page.locator("#tab-extend").is_enabled()


def test_a_file_of_two_gigabytes_is_refused_before_it_is_sent(extender, tmp_path):
    path = tmp_path / "long.mp4"
    with path.open("wb") as file:
        file.truncate(2 * 10**9)  # takes no space
    sent = []
    extender.page.on("request", lambda request: sent.append(request.url) if "uploads" in request.url else None)
    choose(extender, path)
    error = read_error(extender)
    assert "2.0 GB" in error
    assert "209.7 MB" in error
    assert sent == []


def test_an_image_of_900_million_pixels_is_refused(extender, tmp_path):
    path = tmp_path / "huge.png"
    write_large_png(path, 30_000)
    extender.select_tab("image_to_video")
    choose(extender, path, "image")
    assert "huge.png" in read_error(extender, "image") or "30000" in read_error(extender, "image")


def test_the_file_of_a_failed_upload_can_be_replaced(extender, clip_file, tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    choose(extender, path)
    assert "empty" in read_error(extender)
    extender.upload("clip", clip_file)
    assert not extender.field("clip").locator(".error").is_visible()


def test_an_upload_is_stopped(extender, tmp_path):
    path = tmp_path / "noise.mp4"
    path.write_bytes(bytes(5_000_000))
    session = extender.context.new_cdp_session(extender.page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 100_000}
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions", slow)
    choose(extender, path)
    extender.page.get_by_role("progressbar", name="Sending noise.mp4").wait_for()
    extender.press_generate()
    extender.field("clip").locator(".error").get_by_text("is being sent").wait_for()
    extender.field("clip").get_by_role("button", name="Stop").click()
    extender.field("clip").get_by_text("Drop a clip here").wait_for()
    extender.page.wait_for_timeout(200)
    assert extender.field("clip").locator(".chosen").count() == 0


def test_a_file_is_dropped_and_pasted(extender, image_file):
    extender.select_tab("image_to_video")
    drop = """(element, [name, text, kind]) => {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name, { type: "image/png" }));
        const properties = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
        element.dispatchEvent(new (kind === "drop" ? DragEvent : ClipboardEvent)(kind, properties));
    }"""
    text = base64.b64encode(image_file.read_bytes()).decode()
    extender.field("image").evaluate(drop, ["dropped.png", text, "drop"])
    extender.field("image").locator(".chosen").get_by_text("dropped.png").wait_for()
    extender.select_tab("first_and_last_frame")
    extender.field("image").locator(".chosen").get_by_text("dropped.png").wait_for()  # it goes along to another tab
    extender.page.locator("body").evaluate(drop, ["pasted.png", text, "paste"])
    extender.field("last_image").locator(".chosen").get_by_text("pasted.png").wait_for()
    extender.field("image").get_by_role("button", name="Remove").click()
    extender.page.locator("#stage").evaluate(drop, ["beside.png", text, "drop"])
    extender.field("image").locator(".chosen").get_by_text("beside.png").wait_for()


def test_names_of_files_are_texts(extender, clip_file, tmp_path):
    path = tmp_path / "<img src=x onerror=document.title=1>.mp4"
    path.write_bytes(clip_file.read_bytes())
    extender.upload("clip", path)
    assert extender.field("clip").locator(".chosen .name").inner_text() == path.name
    assert extender.page.locator("img[src=x]").count() == 0
