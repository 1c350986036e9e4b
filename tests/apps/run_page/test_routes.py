"""The page of a run over HTTP: it follows a run that is written, escapes text, and serves listed files alone."""

import json
import os
import time
from collections import Counter

import pytest

from dit_video.core.hlo import AttentionCall, Program
from dit_video.core.platform.chips import CHIPS
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.program_report import PROGRAM_FILE, describe_program
from support.html_page import HOSTILE, Page
from support.run_folders import (
    write_checkpoint,
    write_config,
    write_entries,
    write_evaluation,
    write_grid,
    write_models,
)

pytest.importorskip("starlette")


def make_client(run):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from dit_video.apps.run_page import make_run_routes

    return TestClient(Starlette(routes=make_run_routes(run)))


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def client(run):
    return make_client(run)


def get_page(client):
    """Return the page, after checking that its markup is closed and that nothing in it needs a looser policy."""
    response = client.get("/run")
    assert response.status_code == 200
    page = Page(response.text)
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name == "style" or name.startswith("on")]
    assert all("src" in attributes for attributes in page.find("script"))
    return page


def get_tiles(page):
    return " ".join(" ".join(page.text).split())


def test_a_run_that_has_not_begun_has_a_page(client, run):
    assert "Nothing has been trained" in get_tiles(get_page(client))
    write_config(run)
    page = get_page(client)
    assert "ducks" in get_tiles(page)
    assert page.find("progress") == []
    assert client.get("/run/state").json()["status"] == "new"


def test_the_page_of_several_models_has_all_parts_of_each(client, run):
    write_models(run, "prior", "decoder")
    for model in ("prior", "decoder"):
        write_entries(run, 10, 20, name=f"{model}/denoiser")
        write_grid(run, 20, name=f"{model}/denoiser")
        write_checkpoint(run, 20, name=f"{model}/denoiser")
        write_evaluation(run, 20, f"sharpness of {model}", 3.5, name=f"{model}/denoiser")
    page = get_page(client)
    text = get_tiles(page)
    for expected in ("Denoiser of prior", "Denoiser of decoder", "sharpness of prior", "sharpness of decoder"):
        assert expected in text
    addresses = [attributes["href"] for attributes in page.find("a") if "href" in attributes]
    grids = [address for address in addresses if address.startswith("run/media/")]
    assert len(grids) == 2
    for address in grids:
        assert client.get(address).status_code == 200
    assert addresses.count("./?checkpoint=20") == 1  # of the model whose clips they are
    assert client.get("/run/media/other/denoiser/samples/00000020.mp4").status_code == 404


def test_the_page_of_a_run_in_training_has_all_parts(client, run):
    write_config(run, curriculum=(("images", 20),))
    write_entries(run, 10, 20, name="autoencoder", end=time.time() - 100, reconstruction_psnr=31.25)
    write_grid(run, 20, name="autoencoder", kind="reconstructions")
    times = {"interval_seconds": 20.0, "validate_seconds": 2.0, "save_seconds": 4.0, "compile_seconds": 1.0}
    speeds = {"tokens_per_second": 1234.0, "mfu": 0.4321}
    losses = {"loss_t0-0.5": 2.0, "loss_t0.5-1": 1.0, "validation_loss": 0.77, "validation_loss_t0-0.5": 1.0}
    write_entries(run, 10, 20, 30, gradient_norm=2.0, **times, **speeds, **losses)
    for step in (10, 30):
        write_grid(run, step)
        write_checkpoint(run, step, size=2**20)
        write_evaluation(run, step, "sharpness", 3.5)
    page = get_page(client)
    text = get_tiles(page)
    for expected in (
        *("step 30 of 120", "3 min left", "stage denoiser (2 of 2), steps 20 to 120", "training the denoiser"),
        *("0.3226", "validation loss 0.77", "1234", "43.2 %", "31.2 dB"),
        *("Loss by diffusion time", "0 to 0.5", "Newest loss over diffusion time", "Tokens per second", "sharpness"),
        *("waiting for data", "compilation", "checkpoints", "monitoring", "validation"),
        *("decay 0.999, decay 0.9, relative width 0.1, no average", "1.0 MiB", "gradient_norm"),
    ):
        assert expected in text, expected
    assert [link["href"] for link in page.find("a") if "checkpoint" in link["href"]] == [
        "./?checkpoint=30",
        "./?checkpoint=10",
    ]
    assert [details["id"] for details in page.find("details") if "open" in details] == ["training-denoiser"]
    items = [item for item in page.find("li") if "data-src" in item]
    assert [item["data-step"] for item in items] == ["30", "10", "20"]
    for item in items:
        media = client.get(item["data-src"])
        assert (media.status_code, media.headers["content-type"]) == (200, "video/mp4")
    assert items[0]["data-src"].partition("?")[0] == "run/media/denoiser/samples/00000030.mp4"
    assert client.get(items[0]["data-src"]).content == (run / "denoiser/samples/00000030.mp4").read_bytes()
    part = client.get(items[0]["data-src"], headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_state_changes_when_the_run_does_and_only_then(client, run):
    write_config(run)
    write_entries(run, 10)
    first = client.get("/run/state").json()
    assert client.get("/run/state").json() == first
    with (run / "denoiser" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 0.1')
        file.flush()
        assert client.get("/run/state").json() == first
        file.write(', "unix_seconds": null}\n')
    second = client.get("/run/state").json()
    assert second["version"] != first["version"]
    assert second["trainings"][1]["step"] == 20
    for change in (lambda: write_grid(run, 20), lambda: write_checkpoint(run, 20), lambda: write_entries(run, 30)):
        change()
        third = client.get("/run/state").json()
        assert third["version"] != second["version"]
        second = third
    MetricsLog(run / "denoiser" / "metrics.jsonl").resume(10)  # as a process that continues from a checkpoint
    assert client.get("/run/state").json()["trainings"][1]["values"]["step"] == 10


def test_what_a_training_runs_is_shown_with_its_warnings(client, run):
    write_config(run)
    write_entries(run, 10)
    assert "What runs" not in get_tiles(get_page(client))
    program = Program(attention={AttentionCall("cudnn", "Full", "self"): Counter()})
    describe_program(program, {"context": 4}, "gpu", CHIPS["h200"], flags={}).write(run / "denoiser")
    text = get_tiles(get_page(client))
    for expected in ("What runs 2 warnings", "self, Full: cudnn", "warning: the mesh axis context has 4 devices"):
        assert expected in text
    state = client.get("/run/state").json()
    assert len(state["trainings"][1]["warnings"]) == 2
    (run / "denoiser" / PROGRAM_FILE).write_text('{"of": "another version"}')
    assert "What runs" not in get_tiles(get_page(client))


def test_losses_that_are_not_finite_are_counted(client, run):
    write_config(run)
    write_entries(run, 10, 20)
    write_entries(run, 30, loss=None)
    page = get_page(client)
    assert "1 not finite" in get_tiles(page)
    assert client.get("/run/state").json()["trainings"][1]["values"]["loss"] is None
    write_entries(run / "other", 10, loss=None)
    other = make_client(run / "other")
    assert "No finite values to draw" in get_tiles(get_page(other))


def test_an_older_log_without_times_has_a_note(client, run):
    write_config(run)
    write_entries(run, 10, 20)
    assert "An older version wrote a part of this log" in get_tiles(get_page(client))


def test_hostile_text_is_only_text(client, run):
    write_config(run, name=HOSTILE, curriculum=((HOSTILE, 5),), others=({"type": "x", "name": HOSTILE, "steps": 3},))
    write_entries(run, 10, 20, **{HOSTILE: 1.0, f"{HOSTILE}_seconds": 3.0, "interval_seconds": 20.0})
    write_grid(run, 10, texts=(HOSTILE, "a fox"))
    write_evaluation(run, 10, HOSTILE, 1.0)
    document = json.loads((run / "experiment.json").read_text())
    (run / "experiment.json").write_text(json.dumps({**document, "command": HOSTILE}))
    (run / "<i>x").mkdir()
    (run / "<i>x" / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    page = get_page(client)
    assert {element.get("src") for element in page.find("script")} == {"static/theme.js", "static/run.js"}
    assert page.find("i") == page.find("img") == []
    assert "".join(page.text).count(HOSTILE) >= 8
    names = [training["name"] for training in client.get("/run/state").json()["trainings"]]
    assert names == ["autoencoder", "denoiser"]


@pytest.mark.parametrize(
    "path",
    [
        "denoiser/samples/00000020.mp4",
        "denoiser/samples/secret.mp4",
        "denoiser/samples/..%2f..%2fexperiment.json",
        "denoiser/samples/../../experiment.json",
        "denoiser/samples/%2e%2e/%2e%2e/experiment.json",
        "denoiser/samples/..%5c..%5cexperiment.json",
        "denoiser/samples/tiles.json",
        "denoiser/checkpoints/10",
        "denoiser/metrics.jsonl/x",
        "../samples/00000010.mp4",
        "%2e%2e/samples/00000010.mp4",
        "..%2f/samples/00000010.mp4",
        "denoiser/..%2fsamples/00000010.mp4",
        "%2fetc/samples/passwd",
        "data/samples/00000010.mp4",
        "denoiser/samples/00000010.mp4%00.png",
        "denoiser/samples/40.mp4",
        "denoiser/samples/",
    ],
)
def test_only_listed_files_are_served(client, run, path):
    write_config(run)
    write_entries(run, 10)
    write_grid(run, 10)
    write_grid(run, 10, name="data")  # no training
    outside = run.parent / "secret.mp4"
    outside.write_text("secret")
    os.symlink(outside, run / "denoiser" / "samples" / "40.mp4")
    assert client.get("/run/media/denoiser/samples/00000010.mp4").status_code == 200
    response = client.get(f"/run/media/{path}")
    assert response.status_code == 404
    assert b"secret" not in response.content.replace(b"secret.mp4", b"")


def test_the_page_of_a_real_run_has_its_charts(tiny_run):
    page = get_page(make_client(tiny_run))
    text = get_tiles(page)
    assert "finished" in text
    assert "10 of 10 steps" in text
    assert "older version" not in text
    labels = {each["aria-label"] for each in page.find("svg", role="img")}
    assert {"Loss", "Loss by diffusion time", "Tokens per second", "gradient_norm"} <= labels
