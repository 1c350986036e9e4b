"""A data set of every outcome, and its page: for a client without a browser, and served for one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
import pytest

from dit_video.data.tables import write_column
from support.clip_tables import MemoryClips, make_clip_file, make_row, write_table
from support.html_page import HOSTILE

pytest.importorskip("starlette")


def make_rows() -> tuple[list[dict], list[bytes | None]]:
    """Return rows of twelve kept clips and of four that were left out, and the clips' files."""
    rows, files = [], []
    for number in range(12):
        content = make_clip_file(number, frames=1 if number == 11 else 9)
        values = {"motion": float(number), "sharpness": 100.0 - number, "split": "test" if number % 6 == 5 else "train"}
        values |= {"codec": "vp9" if number % 3 == 2 else "h264", "captions": [f"clip number {number} of a Dog"]}
        values |= {"frames": 1, "seconds": 0.0} if number == 11 else {}
        name = f"folder/clip_{number:02d}.mp4" if number < 11 else "picture.png"
        rows.append(make_row(name, content, **values))
        files.append(content)
    rows[0] |= {"captions": [HOSTILE, "a second one"], "source": HOSTILE, "audio_codec": "aac", "audio_rate": 48000}
    rows[1] |= {"captions": [], "motion": None}
    facts = {"motion": 0.25, "captions": ["still water"]}
    rows += [
        make_row("folder/still.mp4", None, outcome="dropped", reason="motion 0.25 is below 1", **facts),
        make_row("folder/dark.mp4#0", None, outcome="cut", reason=f"black {HOSTILE}", start_us=500_000),
        make_row(
            "folder/broken.mp4", None, outcome="unreadable", reason="moov atom not found", height=None, width=None
        ),
        make_row("folder/short.mp4", None, outcome="dropped", reason="shorter than 1 s"),
    ]
    return rows, files + [None] * 4


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> MemoryClips:
    """Return that data set."""
    folder = tmp_path_factory.mktemp("browse") / "data"
    rows, files = make_rows()
    write_table(folder, rows)
    return MemoryClips(folder, files.__getitem__)


@pytest.fixture(scope="session")
def model_clips(tmp_path_factory) -> MemoryClips:
    """Return two clips without captions of the source: a model captioned one, and refused the other."""
    folder = tmp_path_factory.mktemp("models") / "data"
    names, file = ["a.mp4", "b.mp4"], make_clip_file(0)
    write_table(folder, [make_row(name, file, captions=[]) for name in names])
    columns = {"captions_long": pa.array([["A heron wades."], None])}
    columns["captions_large"] = pa.array([["Waders at dusk"], None], pa.large_list(pa.large_string()))
    write_column(folder, "models", pa.table({"name": names, **columns, "captions_long_error": [None, "no heron here"]}))
    return MemoryClips(folder, lambda row: file)


@pytest.fixture(scope="session")
def make_app(tmp_path_factory) -> Callable:
    """Return a function that makes the application of a data set."""
    from dit_video.apps.access import AccessRules
    from dit_video.apps.browse.media import MediaMaker
    from dit_video.apps.browse.routes import make_browse_app

    def make(clips, *, access=AccessRules(is_local=True), title="my data", max_bytes=1 << 24):  # noqa: B008  # frozen
        media = MediaMaker(clips, tmp_path_factory.mktemp("cache"), max_bytes=max_bytes, processes=2)
        return make_browse_app(clips, title, access, media)

    return make


@pytest.fixture(scope="session")
def serve(make_app) -> Iterator[Callable[..., str]]:
    """Return a function that serves the page of a data set, and returns its address."""
    import uvicorn

    servers = []

    def start(clips, **options) -> str:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(clips, **options), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(20)
