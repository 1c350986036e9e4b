"""The script that shows a data set: a page without a server, a server, and what is refused."""

import pytest

from dit_video.curation.export import stored_clips
from support.clip_tables import MemoryClips, make_clip_file, make_row, write_table

pytest.importorskip("starlette")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Return a data set of two clips."""
    files = [make_clip_file(number) for number in range(2)]
    write_table(
        tmp_path / "data", [make_row(f"{number}.mp4", file, motion=number * 1.0) for number, file in enumerate(files)]
    )
    monkeypatch.setattr(stored_clips, "open_clips", lambda folder: MemoryClips(folder, files.__getitem__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "data"


def test_a_page_without_a_server_is_written(script, data, tmp_path):
    ended = script("tools/browse.py", data, "--static", tmp_path / "page", "--where", "motion > 0", "--copy-clips")
    assert ended.code == 0, ended.err
    assert "index.html: 1 rows" in ended.out
    assert (tmp_path / "page" / "clips" / "0.mp4").read_bytes() == make_clip_file(1)


def test_a_server_on_another_host_prints_an_address_with_a_token(script, data, monkeypatch):
    from dit_video.apps import server

    served = []
    monkeypatch.setattr(server, "serve", lambda app, listener: served.append(listener.close()))
    ended = script("tools/browse.py", data, "--port", "0")
    assert "data, 2 rows: http://127.0.0.1:" in ended.out
    assert "token" not in ended.out
    ended = script("tools/browse.py", data, "--port", "0", "--host", "0.0.0.0")
    assert "?token=" in ended.out
    assert len(served) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--where", "motion > 0"), "--static"),
        (("--workers", "0"), "workers"),
        (("--static", "{data}"), "not an empty folder"),
        (("--cache-limit", "much"), "much"),
        (("--token", "short"), "--token"),
    ],
)
def test_wrong_options_are_refused(script, data, options, text):
    ended = script("tools/browse.py", data, *(option.format(data=data) for option in options))
    assert ended.code != 0
    assert text in ended.err
