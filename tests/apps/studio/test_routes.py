"""The studio's interface, with a tiny model that the worker's thread samples."""

import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient

from dit_video.apps.access import AccessRules
from dit_video.apps.server import ServerConfig, make_app
from dit_video.apps.studio.jobs import show_warnings_as_notes
from dit_video.apps.studio.models import StudioModel
from dit_video.core.chat import ChatServer
from dit_video.sampling.expansion import PromptExpander
from dit_video.video import Clip, decode, encode
from support.chat_server import StandIn, complete, fail
from support.tiny_pipeline import make_config, make_pipeline

SIZE = {"frames": 5, "height": 16, "width": 16}
MAX_UPLOAD = 200_000
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Return the application of a tiny model with random weights."""
    folder = tmp_path_factory.mktemp("studio")
    make_pipeline(make_config(steps=8)).save(folder / "model")
    model = StudioModel(folder / "model", make_config(steps=8))
    access = AccessRules(is_local=True)
    config = ServerConfig(title="tiny", run=None, root=folder / "users", access=access, max_upload=MAX_UPLOAD)
    return make_app(config, model)


@pytest.fixture(scope="module")
def server(app):
    """Return a client that keeps the server up."""
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def user(app, server):
    """Return the client of a new user."""
    return open_user(app)


def open_user(app):
    client = TestClient(app, base_url="http://127.0.0.1")
    assert client.get("/").status_code == 200
    return client


def submit(user, tab="text_to_video", sampling=None, **values):
    if tab == "text_to_video":
        values = {"prompt": "a dot", "size": SIZE} | values
    answer = user.post("/api/jobs", json={"tab": tab, "values": values, "sampling": {"seed": 1} | (sampling or {})})
    assert answer.status_code == 201, answer.text
    return answer.json()["job"]


def wait(user, job, *, seconds=60):
    """Return the state of a job once it is finished."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = next(each for each in user.get("/api/state").json()["jobs"] if each["id"] == job)
        if state["status"] in ("done", "failed", "cancelled"):
            return state
        time.sleep(0.05)
    raise AssertionError(f"{state} after {seconds} s")


def list_items(user):
    return user.get("/api/items").json()["items"]


def read_frames(user, url, tmp_path):
    path = tmp_path / url.replace("/", "_")
    path.write_bytes(user.get(url).content)
    return decode(path).frames


def upload(user, content, name="clip.mp4", kind="clip"):
    return user.post(f"/api/uploads?kind={kind}", files={"file": (name, io.BytesIO(content))})


def make_clip(frames=9, height=16, width=32):
    values = np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), np.uint8)
    return Clip(values, fps=8)


def test_a_job_is_sampled_and_its_clip_is_in_the_gallery_with_its_recipe(user, tmp_path):
    state = wait(user, submit(user, sampling={"seed": 5, "count": 2}))
    assert state["status"] == "done", state
    assert len(state["items"]) == 2
    items = list_items(user)
    assert {item["seed"] for item in items} == {5, 6}
    assert [item["id"] for item in items] == state["items"][::-1]
    item = items[0]
    assert (item["frames"], item["height"], item["width"], item["tab"]) == (5, 16, 16, "text_to_video")
    assert item["recipe"]["prompt"] == "a dot"
    frames = read_frames(user, item["files"]["apng"], tmp_path)
    for name, kind in (("mp4", "video/mp4"), ("webm", "video/webm"), ("gif", "image/gif"), ("png", "image/png")):
        answer = user.get(item["files"][name])
        assert answer.headers["content-type"] == kind
    assert user.get(item["files"]["mp4"], headers={"Range": "bytes=0-99"}).status_code == 206
    # The same seed gives the same clip.
    again = {"tab": item["tab"], "values": item["values"], "sampling": item["sampling"]}
    wait(user, user.post("/api/jobs", json=again).json()["job"])
    np.testing.assert_array_equal(read_frames(user, list_items(user)[0]["files"]["apng"], tmp_path), frames)
    assert user.delete(f"/api/items/{item['id']}").status_code == 204
    assert item["id"] not in {each["id"] for each in list_items(user)}
    assert user.get(item["files"]["mp4"]).status_code == 404


@pytest.mark.nightly
def test_uploads_and_clips_of_the_gallery_are_inputs(user, tmp_path):
    described = upload(user, encode(make_clip(), "mp4")).json()
    assert described["used"] == {"frames": 9, "height": 16, "width": 32}
    assert user.get(f"/api/uploads/{described['upload']}").json() == described
    state = wait(user, submit(user, "extend", clip={"upload": described["upload"]}, frames=4, prompt="on"))
    assert state["status"] == "done", state
    (item,) = list_items(user)
    assert item["frames"] == 13
    (entry,) = item["inputs"]
    assert entry["name"] == "clip.apng"
    known = read_frames(user, entry["url"], tmp_path)
    np.testing.assert_array_equal(read_frames(user, item["files"]["apng"], tmp_path)[:9], known)
    state = wait(user, submit(user, "vary", clip={"item": item["id"]}, strength=0.5))
    assert state["status"] == "done", state
    assert list_items(user)[0]["title"] == "on"  # the clip's caption


def test_users_see_nothing_of_each_other(app, user, server):
    other = open_user(app)
    described = upload(user, encode(make_clip(), "webm"), "clip.webm").json()
    wait(user, job := submit(user))
    (item,) = list_items(user)
    assert list_items(other) == []
    assert other.get("/api/state").json()["jobs"] == []
    addresses = [*item["files"].values(), *described["files"].values(), f"/api/uploads/{described['upload']}"]
    assert [user.get(address).status_code for address in addresses] == [200] * len(addresses)
    assert [other.get(address).status_code for address in addresses] == [404] * len(addresses)
    assert other.get(f"/api/jobs/{job}/preview").status_code == 404
    assert other.delete(f"/api/jobs/{job}").status_code == 404
    assert other.delete(f"/api/items/{item['id']}").status_code == 404
    for reference in ({"item": item["id"]}, {"upload": described["upload"]}):
        body = {"tab": "vary", "values": {"clip": reference}, "sampling": {}}
        assert other.post("/api/jobs", json=body).status_code == 422


def test_jobs_of_two_users_both_finish_and_a_cancelled_one_frees_the_queue(app, user, server):
    other = open_user(app)
    first = submit(user, sampling={"steps": 1000})
    second, third = submit(user), submit(other)
    assert user.delete(f"/api/jobs/{first}").status_code == 204
    assert wait(user, first)["status"] == "cancelled"
    assert wait(user, second)["status"] == wait(other, third)["status"] == "done"


def test_previews_are_animated_once_a_clip_was_made(user):
    wait(user, submit(user))  # the preview decoder is fitted to it
    job = submit(user, sampling={"steps": 200})
    wait(user, job)
    assert next(each for each in user.get("/api/state").json()["jobs"] if each["id"] == job)["preview"] >= 1
    answer = user.get(f"/api/jobs/{job}/preview?v=1")
    assert answer.headers["content-type"] == "image/webp"
    assert b"ANIM" in answer.content[:64]


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ({"tab": "text_to_video", "values": {"size": SIZE | {"height": 24}}}, "size", "use 16 or 32"),
        ({"tab": "text_to_video", "values": {"size": SIZE | {"frames": 6}}}, "size", "use 5 or 9"),
        ({"tab": "text_to_video", "values": {"size": SIZE}, "sampling": {"steps": 0}}, "steps", "at least 1"),
        ({"tab": "text_to_video", "values": {"size": SIZE}, "sampling": {"solver": "x"}}, "solver", "euler"),
        ({"tab": "text_to_video", "values": {"size": SIZE, "prompt": "x" * 10_001}}, "prompt", "at most 10000"),
        ({"tab": "loop", "values": {"size": SIZE | {"frames": 9}}}, "size", "multiple of 4"),
        ({"tab": "extend", "values": {"frames": 4}}, "clip", "missing"),
        ({"tab": "vary", "values": {"clip": "CLIP", "strength": 0.05}}, "strength", "no step begins"),
        ({"tab": "interpolate", "values": {"clip": "CLIP", "factor": 1}}, "factor", "at least 2"),
        ({"tab": "magic"}, None, "Reload the page"),
        ([], None, "object"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_it_waits(user, body, field, text):
    if isinstance(body, dict) and body.get("values", {}).get("clip") == "CLIP":
        described = upload(user, encode(make_clip(), "mp4")).json()
        body = body | {"values": body["values"] | {"clip": {"upload": described["upload"]}}}
    answer = user.post("/api/jobs", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["field"] == field
    assert text in answer.json()["error"]
    assert user.get("/api/state").json()["jobs"] == []


def test_bad_requests_are_answered_in_json(user):
    assert user.post("/api/jobs", content=b"{not json").status_code == 422
    assert user.post("/api/jobs", content=b"[" * 100_000).status_code == 422
    assert user.get("/api/jobs").json() == {"error": "Method Not Allowed", "field": None}
    assert user.post("/api/uploads?kind=program", files={"file": ("a", b"b")}).status_code == 422
    assert user.post("/api/uploads?kind=clip", data={"file": "text"}).status_code == 422
    assert user.post("/api/uploads?kind=clip", content=b"x").status_code == 422


def test_uploads_have_a_limit_by_their_header_and_by_their_bytes(user):
    answer = upload(user, b"x" * (MAX_UPLOAD + 1))
    assert answer.status_code == 413
    assert "larger than 0.2 MiB" in answer.json()["error"]

    def stream():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        for _ in range(1000):
            yield b"x" * 1000
        yield b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}  # in chunks, without a length
    assert user.post("/api/uploads?kind=clip", content=stream(), headers=headers).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/media/items/..%2f..%2fmodel/clip.png",
        "/media/items/%2e%2e/clip.png",
        "/media/items/0123456789abcdef/clip.png",
        "/media/items/{item}/..%2fitem.json",
        "/media/items/{item}/item.json",
        "/media/items/{item}/frames.npy",
        "/media/items/{item}/inputs/..%2f..%2f{item}/clip.png",
        "/media/items/{item}/inputs/%2e%2e/clip.png",
        "/media/uploads/..%2fitems%2f{item}/clip.png",
        "/static/..%2fserver.py",
        "/static/%2e%2e/server.py",
        "/static//etc/passwd",
        "/api/uploads/..%2f{item}",
    ],
)
def test_no_other_file_of_the_server_is_reached(user, path):
    wait(user, submit(user))
    item = list_items(user)[0]["id"]
    answer = user.get(path.format(item=item))
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_texts_of_users_are_json_and_never_part_of_a_page(user):
    state = wait(user, submit(user, prompt=HOSTILE[:50]))
    assert state["status"] == "done"
    assert HOSTILE[:50] in json.dumps(list_items(user), ensure_ascii=False).replace("\\", "")
    assert "onerror" not in user.get("/").text
    name = "<script>alert(2)</script>.png"
    assert upload(user, encode(make_clip(1), "png"), name, "image").json()["name"] == name
    assert user.get("/api/items").headers["content-type"] == "application/json"
    answer = user.get(f"/{HOSTILE}")
    assert answer.status_code == 404
    assert "onerror" not in answer.text


def test_events_send_the_state_and_end_with_the_browser(app, user):
    with user.stream("GET", "/api/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        line = next(answer.iter_lines())
    assert json.loads(line.removeprefix("data: ")) == {"jobs": [], "waiting": 0, "gallery": 0}


def test_an_error_of_the_program_is_said_and_the_next_job_is_sampled(user, monkeypatch):
    from dit_video.apps.studio.gallery import Gallery

    with monkeypatch.context() as patch:
        patch.setattr(Gallery, "add", lambda *arguments: 1 / 0)
        state = wait(user, submit(user))
    assert state["status"] == "failed"
    assert "ZeroDivisionError" in state["error"]
    assert wait(user, submit(user))["status"] == "done"


def test_a_prompt_that_is_cut_is_said_with_the_job(user):
    show_warnings_as_notes()  # again: pytest shows warnings in its own way
    state = wait(user, submit(user, prompt="word " * 200))
    assert state["status"] == "done"
    (note,) = state["notes"]
    assert "cut to 32" in note
    assert list_items(user)[0]["notes"] == [note]


@pytest.mark.nightly
def test_clips_of_the_gallery_are_shortened_where_a_task_changes_all_of_them(user):
    show_warnings_as_notes()
    wait(user, submit(user, "loop", prompt="around", size=SIZE | {"frames": 8}))
    (loop,) = list_items(user)
    state = wait(user, submit(user, "vary", clip={"item": loop["id"]}, strength=0.5))
    assert state["status"] == "done", state
    assert any("left out" in note for note in state["notes"])
    assert list_items(user)[0]["frames"] == 5
    edit = {"clip": {"item": loop["id"]}, "prompt": "a square", "source": "a dot"}
    assert wait(user, submit(user, "described_edit", **edit))["status"] == "done"
    state = wait(user, submit(user, "extend", clip={"item": loop["id"]}, frames=4))
    assert list_items(user)[0]["frames"] == 12  # this task keeps all of it


@pytest.fixture
def chat():
    stand_in = StandIn()
    stand_in.answer = lambda number, body: complete("A white dot moves over a dark ground.")
    yield stand_in
    stand_in.close()


def test_prompts_are_expanded_and_named_in_the_recipe(chat, tmp_path):
    config = replace(make_config(steps=1), example_prompts=("a dot", "a line"))
    make_pipeline(config).save(tmp_path / "model")
    expander = PromptExpander(server=ChatServer(url=chat.url, model="qwen", retries=0))
    model = StudioModel(tmp_path / "model", config, expander=expander)
    access = AccessRules(is_local=True)
    settings = ServerConfig(title="t", run=None, root=tmp_path / "users", access=access, max_upload=MAX_UPLOAD)
    app = make_app(settings, model)
    with TestClient(app, base_url="http://127.0.0.1"):
        user = open_user(app)
        described = user.get("/api/model").json()
        assert (described["expands"], described["examples"]) == (True, ["a dot", "a line"])
        expanded = user.post("/api/expand", json={"prompt": "a dot"}).json()["prompt"]
        assert expanded == "A white dot moves over a dark ground."
        for prompt in (expanded, "a line"):
            assert wait(user, submit(user, prompt=prompt))["status"] == "done"
        plain, long = (item["recipe"] for item in list_items(user))
        assert (long["prompt"], long["expanded_from"]) == (expanded, "a dot")
        assert "expanded_from" not in plain
        chat.answer = lambda number, body: fail(500)
        answer = user.post("/api/expand", json={"prompt": "a dot"})
        assert (answer.status_code, "answers 500" in answer.json()["error"]) == (422, True)
        assert user.post("/api/expand", json={"prompt": 3}).status_code == 422


def test_a_server_without_a_language_model_expands_nothing(user):
    described = user.get("/api/model").json()
    assert described["expands"] is False
    assert user.post("/api/expand", json={"prompt": "a dot"}).status_code == 422
    assert described["examples"] == []


def test_open_weights_offer_prompts_of_what_people_film(tmp_path):
    config = replace(make_config(steps=1), provenance={"loaded from": "MODEL"})
    examples = StudioModel(tmp_path, config).example_prompts
    assert len(set(examples)) == 4
    assert min(map(len, examples)) > 20
