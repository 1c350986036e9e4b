"""Look at a data set in a browser: sort, filter and play its clips, and choose limits from histograms."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

import os
from pathlib import Path
from typing import Annotated

import tyro

from dit_video.core.command_line import check_minimum, parse_arguments, parse_memory
from dit_video.core.errors import UserError, script
from dit_video.core.storage import get_default_cache
from dit_video.curation.export.stored_clips import open_clips

DEFAULT_PORT = 7861


def main(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    token: str | None = None,
    workers: int | None = None,
    cache_limit: str = "1GiB",
    static: Path | None = None,
    where: str = "",
    copy_clips: bool = False,
) -> None:
    """Look at a data set in a browser: sort, filter and play its clips, and choose limits from histograms.

    For example:

        python tools/browse.py data
        python tools/browse.py data --static page --where "motion > 5" --copy-clips

    Args:
        data: Folder or address of a data set.
        host: Address to listen at. By default only this machine's browsers reach it; at 0.0.0.0 all do that have the
            token.
        port: Port to listen at; 0 for any that is free.
        token: Text that browsers send once, in the address that is printed; random by default for another host than
            127.0.0.1, where there is none.
        workers: Number of processes that decode thumbnails and clips; one per core by default.
        cache_limit: Maximum size of the folder ~/.cache/dit_video/browse with thumbnails and clips made for browsers.
        static: Folder to write a page into that needs no server, instead of serving one.
        where: Condition of the rows of that page, such as "motion > 5".
        copy_clips: Copy the clips to that page, which then plays them.
    """
    check_minimum(1, workers=workers)
    try:
        from dit_video.apps import server
        from dit_video.apps.browse.media import MediaMaker
        from dit_video.apps.browse.pages import write_static_page
        from dit_video.apps.browse.routes import make_browse_app
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed. Use pip install 'dit-video[web]'") from error
    from dit_video.apps.access import AccessRules, is_loopback, make_token

    if static is None and (where or copy_clips):
        raise UserError("--where and --copy-clips are for a page without a server. Add --static FOLDER")
    clips, title = open_clips(data), data.rstrip("/").rpartition("/")[2] or data
    media = MediaMaker(
        clips,
        get_default_cache() / "browse",
        max_bytes=parse_memory(cache_limit),
        processes=workers or os.cpu_count() or 1,
    )
    if static is not None:
        try:
            count = write_static_page(clips, title, static, media, where=where, copy_clips=copy_clips)
        finally:
            media.close()
        print(f"{static / 'index.html'}: {count} rows")
        return
    is_local = is_loopback(host)
    access = AccessRules(is_local=is_local and token is None, token=token if is_local else token or make_token())
    app = make_browse_app(clips, title, access, media)
    listener = server.open_socket(host, port)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}/" + (f"?token={access.token}" if access.token else "")
    print(f"{title}, {len(clips.table)} rows: {address}", flush=True)
    server.serve(app, listener)


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
