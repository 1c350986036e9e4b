"""Files that would exploit the decoder: they take little memory, see no secrets, and are accounted for."""

import json
import os
import sys
from pathlib import Path

import pytest

from dit_video.data.ingest import workers
from dit_video.data.ingest.formats import ListedClip
from dit_video.data.ingest.inspection import Inspection, InspectionConfig
from support.devices import PROGRAMS
from support.hostile_files import claim_audio_packets, claim_fragment, claim_keys, make_mkv, make_mp4, make_png

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Return the folder of what workers write down."""
    (tmp_path / "log").mkdir()
    monkeypatch.setenv("DIT_VIDEO_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.setattr(workers, "MODULE", "measured_worker")
    return tmp_path / "log"


def inspect(folder: Path, files: dict[str, bytes], time_limit: float = 60.0) -> dict[str, Inspection]:
    """Return the verdicts on files, after a second attempt where there is one."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    clips = [ListedClip(name, (), len(content), str(folder / name)) for name, content in files.items()]
    with workers.Workers(1, InspectionConfig(), time_limit) as pool:
        verdicts = dict(pool.inspect(enumerate(clips)))
        again = [(number, clips[number]) for number, verdict in verdicts.items() if verdict.transient]
        verdicts |= dict(pool.inspect_again(again))
    return {clip.name: verdicts[number] for number, clip in enumerate(clips)}


@pytest.mark.slow
def test_small_files_that_claim_gigabytes_are_quarantined_in_little_memory(tmp_path, log):
    files = {
        "audio.mp4": claim_audio_packets(),
        "fragment.mp4": claim_fragment(),
        "keys.mp4": claim_keys(),
        "huge.png": make_png(1024, 1 << 17),
        "whole.mp4": make_mp4(),
        "whole.png": make_png(32, 48),
    }
    verdicts = inspect(tmp_path / "clips", files)
    assert [name for name, verdict in verdicts.items() if not verdict.reason] == ["whole.mp4", "whole.png"]
    assert not any(verdict.transient for verdict in verdicts.values())
    assert "claims 85000000 packets" in verdicts["audio.mp4"].reason
    memory = [json.loads(line) for line in (log / "memory").read_text().splitlines()]
    assert {name for name, _ in memory} == set(files)
    assert max(peak for _, peak in memory) < 1 << 30, memory


def test_a_worker_has_no_secrets_and_few_privileges(tmp_path, log, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert not inspect(tmp_path / "clips", {"a.mp4": make_mp4()})["a.mp4"].reason
    process = json.loads((log / "process").read_text())
    assert "secret" not in process.values()
    assert not [name for name in process if name.startswith(("AWS", "HF"))]
    assert process["PATH"] == os.environ["PATH"]
    assert (process["RLIMIT_CORE"], process["RLIMIT_NOFILE"], process["new"]) == (0, 256, "1")


def test_a_worker_that_reads_from_a_bucket_keeps_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "AWS_SECRET_ACCESS_KEY" not in workers.make_environment(is_trusted=False)
    assert workers.make_environment(is_trusted=True)["AWS_SECRET_ACCESS_KEY"] == "secret"


@pytest.mark.parametrize("is_allowed", [True, False])
def test_bubblewrap_takes_the_network_away_where_it_works(tmp_path, log, monkeypatch, is_allowed):
    """A stand-in of `bwrap` notes its options and runs the command, or fails, as in a container."""
    program = tmp_path / "bin" / "bwrap"
    program.parent.mkdir()
    run = 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"' if is_allowed else "exit 1"
    program.write_text(f'#!/bin/sh\necho "$@" >> {log}/options\n{run}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    workers.find_sandbox.cache_clear()
    verdicts = inspect(tmp_path / "clips", {"a.mp4": make_mp4(), "b.mp4": b"broken"})
    workers.find_sandbox.cache_clear()
    assert [bool(verdict.reason) for verdict in verdicts.values()] == [False, True]
    started = [line for line in (log / "options").read_text().splitlines() if "measured_worker" in line]
    assert len(started) == (1 if is_allowed else 0)
    assert all("--unshare-net" in line and "--die-with-parent" in line for line in started)


PLAYLISTS = {
    "concat.mp4": "ffconcat version 1.0\nfile {secret}\n",
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
    "dash.mp4": '<?xml version="1.0"?><MPD type="static"><Period><AdaptationSet><Representation>'
    "<BaseURL>file://{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "subtitles.mp4": "[Script Info]\nScriptType: v4.00+\n[Events]\nFormat: Text\nDialogue: {secret}\n",
}


def test_playlists_named_as_videos_open_nothing(tmp_path, log):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(make_mp4())
    verdicts = inspect(
        tmp_path / "clips", {name: text.format(secret=secret).encode() for name, text in PLAYLISTS.items()}
    )
    assert ["is not a readable video or image" in verdict.reason for verdict in verdicts.values()] == [True] * 4


def test_the_time_limit_grows_with_the_pixels_of_the_header():
    """An hour of 4K may take its hours, and a small file that claims as much may not."""
    clip = ListedClip("a.mp4", (), 2 << 30, "a.mp4")
    pixels = 3600 * 24 * 3840 * 2160
    assert workers.compute_time_limit(clip, 120, pixels) > 6 * 3600
    assert workers.compute_time_limit(clip._replace(size=2_800), 120, pixels) < 121


@pytest.mark.nightly
def test_a_file_gets_more_time_once_its_header_is_read(tmp_path, log):
    """The worker takes 1.5 seconds for a `slow` file; only one whose header claims hours is waited for."""
    files = {"slow_short.mkv": make_mkv(1.0, 4 << 20), "slow_long.mkv": make_mkv(1e6, 4 << 20)}
    verdicts = inspect(tmp_path / "clips", files, time_limit=0.7)
    assert "takes more than 0.7" in verdicts["slow_short.mkv"].reason
    assert not verdicts["slow_long.mkv"].reason
