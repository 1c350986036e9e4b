"""The command `python -m dit_video.web`: what it refuses before it listens, and what it prints."""

import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from dit_video.apps import server
from dit_video.core.errors import MissingError, UserError
from dit_video.distributed import Parallelism
from dit_video.web import __main__ as command
from support.run_folders import write_models
from support.tiny_pipeline import make_config, make_pipeline

CONFIG = make_config(steps=2)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return the folder of a tiny model with random weights."""
    folder = tmp_path_factory.mktemp("main") / "model"
    make_pipeline(CONFIG).save(folder)
    return folder


@pytest.fixture
def served(monkeypatch):
    """Return the application and address of a server that ends at once."""
    calls = []

    def serve(app, listener):
        calls.append((app, listener.getsockname()))
        listener.close()

    monkeypatch.setattr(server, "serve", serve)
    return calls


def test_a_folder_that_is_no_model_is_refused(tmp_path, served):
    with pytest.raises(MissingError, match="holds no model"):
        command.main(tmp_path, port=0)
    with pytest.raises(MissingError, match="no such"):
        command.main(tmp_path / "absent", port=0)
    assert served == []


def test_a_port_in_use_is_said_with_another_one(model, tmp_path, served):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port={port} .* Use --port {port + 1}"):
            command.main(model, port=port, out=tmp_path, cache=False)


def test_addresses_and_ports_that_do_not_exist_are_refused(model, tmp_path, served):
    with pytest.raises(UserError, match=r"port=70000 is invalid"):
        command.main(model, port=70_000, out=tmp_path, cache=False)
    with pytest.raises(UserError, match=r"203\.0\.113\.7"):
        command.main(model, host="203.0.113.7", port=0, out=tmp_path, cache=False)
    with pytest.raises(UserError, match="--token"):
        command.main(model, port=0, token="x", out=tmp_path, cache=False)
    with pytest.raises(MissingError, match="--lora"):
        command.main(model, port=0, lora=("absent.safetensors",), out=tmp_path, cache=False)


def test_other_machines_need_a_token_which_the_address_has(model, tmp_path, served, capsys):
    command.main(model, port=0, out=tmp_path, cache=False)
    assert re.search(r"http://127\.0\.0\.1:\d+/$", capsys.readouterr().out.strip())
    command.main(model, host="0.0.0.0", port=0, out=tmp_path, cache=False)
    assert re.search(r"http://0\.0\.0\.0:\d+/\?token=[\w-]{20,}$", capsys.readouterr().out.strip())
    assert served[1][1][0] == "0.0.0.0"


def test_a_run_without_a_model_shows_its_page(tmp_path, tiny_run, served):
    run = tmp_path / "run"
    run.mkdir()
    (run / "experiment.json").write_bytes((tiny_run / "experiment.json").read_bytes())
    command.main(run, port=0, out=tmp_path, cache=False)
    with TestClient(served[0][0], base_url="http://127.0.0.1") as client:
        assert client.get("/run").status_code == 200
        page = client.get("/")
    assert page.status_code == 404
    assert "This run has no model yet" in page.text


def test_a_run_of_several_models_names_their_studios(tmp_path, served):
    write_models(tmp_path / "run", "prior", "decoder", is_joined=False)
    command.main(tmp_path / "run", port=0, out=tmp_path, cache=False)
    with TestClient(served[0][0], base_url="http://127.0.0.1") as client:
        assert f"python -m dit_video.web {tmp_path}/run/decoder" in client.get("/").text


@pytest.mark.slow
def test_the_shipped_model_is_up_soon_and_ends_with_ctrl_c(tmp_path):
    arguments = ["experiments/pretrained/shapes", "--port", "0", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "dit_video.web", *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    start = time.monotonic()
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        assert httpx.get(address, timeout=60).status_code == 200
        seconds = time.monotonic() - start
        process.send_signal(2)
        assert process.wait(30) == 0
    finally:
        process.kill()
    assert seconds < 40  # 20 on a machine that does nothing else: docs/benchmarks.md


def test_a_model_that_cannot_be_loaded_is_said_with_each_job(model, tmp_path, served):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "denoiser.safetensors").write_bytes(b"no weights")
    command.main(broken, port=0, out=tmp_path, cache=False)
    size = {"frames": 5, "height": 16, "width": 16}
    with TestClient(served[0][0], base_url="http://127.0.0.1") as client:
        client.get("/")
        for number in range(2):
            client.post("/api/jobs", json={"tab": "text_to_video", "values": {"size": size}})
            end = time.monotonic() + 60
            while (job := client.get("/api/state").json()["jobs"][number])["status"] not in ("done", "failed"):
                assert time.monotonic() < end
                time.sleep(0.05)
            assert job["status"] == "failed"
            assert "denoiser.safetensors" in job["error"]


def test_loading_has_the_options_of_sampling(model, tmp_path, served, monkeypatch):
    from dit_video.apps.studio import models

    loaded = []
    monkeypatch.setattr(models, "load", lambda folder, **options: loaded.append(options) or make_pipeline(CONFIG))
    command.main(model, port=0, out=tmp_path, attention="dense", parallel="data=1", cache=False)
    with TestClient(served[0][0], base_url="http://127.0.0.1"):
        end = time.monotonic() + 60
        while not loaded and time.monotonic() < end:
            time.sleep(0.05)
    assert loaded[0]["attention"] == "dense"
    assert loaded[0]["parallel"] == Parallelism(data=1)
    with pytest.raises(UserError, match="--parallel nonsense is invalid"):
        command.main(model, port=0, out=tmp_path, parallel="nonsense", cache=False)
