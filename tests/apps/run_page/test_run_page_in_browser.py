"""The page of a run in headless Chromium: it follows the run without a reload, and keeps what the reader does."""

import shutil
import socket
import threading
import time

import pytest

from support.chromium import open_chromium
from support.html_page import HOSTILE
from support.run_folders import write_checkpoint, write_config, write_entries, write_grid

pytest.importorskip("playwright")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    """Return headless Chromium."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def serve():
    """Return a function that serves the page of a run as the studio does, and returns the server and its address."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware

    from dit_video.apps.access import Access, AccessRules
    from dit_video.apps.pages import make_static_route
    from dit_video.apps.run_page import make_run_routes

    servers = []

    def start(run):
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        routes = [make_static_route(), *make_run_routes(run)]
        app = Starlette(routes=routes, middleware=[Middleware(Access, rules=AccessRules(is_local=True))])
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return server, f"http://127.0.0.1:{listener.getsockname()[1]}/run"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(20)


def wait_until(page, condition, *, seconds=30.0):
    """Wait until an expression is true; `wait_for_function` is not let by the page's policy."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


@pytest.fixture
def open_page(browser):
    """Return a function that opens an address in a context of its own; scripts must raise no error."""
    contexts, errors = [], []

    def start(address, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        wait_until(
            page, "[...document.querySelectorAll('#run time')].every((each) => /ago|now/.test(each.textContent))"
        )
        return page

    yield start
    for context in contexts:
        context.close()
    assert [error for error in errors if "ERR_CONNECTION" not in error] == []


@pytest.fixture
def run(tmp_path):
    """Return a run in training, with samples of two steps."""
    write_config(tmp_path)
    write_entries(tmp_path, 10, 20, name="autoencoder", end=time.time() - 100)
    write_entries(tmp_path, 10, 20, 30, gradient_norm=1.0, interval_seconds=20.0)
    for step in (10, 30):
        write_grid(tmp_path, step)
        write_checkpoint(tmp_path, step)
    return tmp_path


CURVE = "#training-denoiser-losses-loss polyline.line"
VIDEOS = "#training-denoiser-samples-viewer video"


def wait_for_step(page, step):
    wait_until(page, f"document.getElementById('run-header').innerText.includes('step {step} of 100')")


def test_a_real_run_is_followed_without_a_reload(tiny_run, tmp_path, serve, open_page):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(run / "pipeline")
    log = run / "denoiser" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    shutil.rmtree(run / "denoiser" / "checkpoints")
    log.write_text("".join(lines[:-2]))
    page = open_page(serve(run)[1])
    page.evaluate("window.mark = 1")
    assert "step 6 of 10" in page.inner_text("#run-header")
    points = page.get_attribute(CURVE, "points")
    assert len(points.split()) == 2
    assert page.locator("#training-denoiser-losses-loss svg.chart").bounding_box()["height"] > 100
    with log.open("a") as file:
        file.write(lines[-2][:20])
        file.flush()
        page.wait_for_timeout(5000)
        assert page.get_attribute(CURVE, "points") == points
        file.write(lines[-2][20:] + lines[-1])
    wait_until(page, "document.getElementById('run-header').innerText.includes('step 10 of 10')")
    assert len(page.get_attribute(CURVE, "points").split()) == 4
    assert "finished" in page.inner_text(".pill")
    assert "100 %" in page.title()
    assert page.evaluate("window.mark") == 1


def test_what_the_reader_does_is_left_alone(run, serve, open_page):
    page = open_page(serve(run)[1])
    wait_until(page, f"document.querySelector('{VIDEOS}')?.currentTime > 0.1")
    page.click("#training-autoencoder-summary")
    page.click("#training-denoiser-others-summary")
    page.select_option("#training-denoiser-samples [data-role=tile]", "1")
    page.focus("#training-denoiser-checkpoints-scroll")
    page.evaluate(
        f"""() => {{
            document.documentElement.style.scrollBehavior = "auto";
            window.scrollTo(0, 700);
            window.video = document.querySelector("{VIDEOS}");
            window.pauses = 0;
            window.video.addEventListener("pause", () => window.pauses++);
            window.chart = document.getElementById("training-denoiser-losses-loss");
            window.other = document.getElementById("training-autoencoder-losses-loss");
        }}"""
    )
    scroll = page.evaluate("window.scrollY")
    write_entries(run, 40, gradient_norm=1.0, interval_seconds=20.0)
    wait_for_step(page, 40)
    assert page.evaluate("window.scrollY") == scroll
    assert page.evaluate("document.getElementById('training-autoencoder').open")
    assert page.evaluate("document.getElementById('training-denoiser-others').open")
    assert page.evaluate("document.querySelector('#training-denoiser-samples select').value") == "1"
    assert page.evaluate("document.activeElement.id") == "training-denoiser-checkpoints-scroll"
    assert page.evaluate(f"window.video === document.querySelector('{VIDEOS}') && window.pauses === 0")
    assert not page.evaluate("window.chart.isConnected")
    assert page.evaluate("window.other.isConnected")  # it did not change


def test_samples_are_viewed_by_step_and_prompt_and_new_ones_appear(run, serve, open_page):
    page = open_page(serve(run)[1])
    series = "#training-denoiser-samples"
    assert page.inner_text(f"{series} output") == "step 30"
    assert page.locator(VIDEOS).count() == 1
    write_grid(run, 50)
    write_entries(run, 50)
    wait_for_step(page, 50)
    assert page.inner_text(f"{series} output") == "step 50"  # the newest one is followed
    steps = [text.strip() for text in page.locator(f"{series} .strip li").all_inner_texts()]
    assert steps == ["step 50", "step 30", "step 10"]
    page.focus(f"{series} [data-role=step]")
    page.keyboard.press("Home")
    assert page.inner_text(f"{series} output") == "step 10"
    assert page.locator(f"{series}-viewer figcaption").all_inner_texts() == ["step 10", "step 50, the newest"]
    write_grid(run, 60)
    write_entries(run, 60)
    wait_for_step(page, 60)
    assert page.inner_text(f"{series} output") == "step 10"  # the chosen one stays
    assert page.locator(f"{series}-viewer figcaption").all_inner_texts() == ["step 10", "step 60, the newest"]
    # The first prompt's clip lies in the left half of a grid, in which the frame of both together is twice as wide.
    frame = f"{series}-viewer .grid-frame"
    whole = page.locator(frame).first.bounding_box()
    page.select_option(f"{series} [data-role=tile]", label="a fox")
    tile = page.locator(frame).first.bounding_box()
    assert whole["width"] / whole["height"] == pytest.approx(50 / 16, rel=0.02)
    assert tile["width"] / tile["height"] == pytest.approx(24 / 16, rel=0.02)
    video = page.locator(f"{frame} video").first.bounding_box()
    assert video["x"] == pytest.approx(tile["x"] - tile["width"] * 26 / 24, abs=1)
    page.locator(f"{series} .strip button").nth(1).click()
    assert page.inner_text(f"{series} output") == "step 50"
    wait_until(page, f"[...document.querySelectorAll('{VIDEOS}')].every((each) => each.readyState > 1)")
    page.click(f"{series} [data-role=pause]")
    wait_until(page, "[...document.querySelectorAll('video')].every((each) => each.paused)")


def test_a_run_appears_on_an_open_page_when_it_begins(tmp_path, serve, open_page):
    page = open_page(serve(tmp_path)[1])
    assert "Nothing has been trained" in page.inner_text("#run")
    write_config(tmp_path)
    write_entries(tmp_path, 10)
    wait_for_step(page, 10)
    assert page.locator("details.training[open]").count() == 1


def test_hostile_text_stays_text_when_it_is_put_in_place(run, serve, open_page):
    page = open_page(serve(run)[1])
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    write_config(run, name=HOSTILE)
    write_entries(run, 40, **{HOSTILE: 1.0})
    write_grid(run, 40, texts=(HOSTILE, "a fox"))
    wait_for_step(page, 40)
    assert page.inner_text("h1") == HOSTILE
    assert page.locator("#run img, #run script").count() == 0


def test_a_server_that_ends_is_reported(run, serve, open_page):
    server, address = serve(run)
    page = open_page(address)
    server.should_exit = True
    page.wait_for_selector("#connection:visible")
    assert "does not answer" in page.inner_text("#connection")
    assert "step 30 of 100" in page.inner_text("#run-header")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways(run, serve, open_page, scheme):
    write_config(run, name="a_long_name_without_any_space_" * 3, curriculum=(("images" * 20, 10),))
    page = open_page(serve(run)[1], viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for details in page.locator("details").all():
        details.evaluate("(element) => { element.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
