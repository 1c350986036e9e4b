"""The page without a server: it contains its data, its files exist, and texts cannot become markup."""

import json
import re

import pytest

from dit_video.core.errors import UserError
from support.clip_tables import MemoryClips, make_row, write_table
from support.html_page import HOSTILE, Page

pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def media(clips, tmp_path_factory):
    from dit_video.apps.browse.media import MediaMaker

    media = MediaMaker(clips, tmp_path_factory.mktemp("cache"), max_bytes=1 << 24, processes=1)
    yield media
    media.close()


def write(clips, folder, media, **options):
    from dit_video.apps.browse.pages import write_static_page

    return write_static_page(clips, "my data", folder, media, **options)


def read_data(folder):
    text = (folder / "index.html").read_text()
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_it_holds_all_rows_with_thumbnails_and_clips(clips, tmp_path, media):
    assert write(clips, tmp_path / "page", media, copy_clips=True) == 16
    data = read_data(tmp_path / "page")
    assert len(data["rows"]) == 16
    assert data["data"]["total"]["clips"] == 12
    for number, row in enumerate(data["rows"]):
        assert row["row"] == number
        assert row["kept"] == (number < 12)
        assert set(row["files"]) == ({"thumbnail", "original"} if number < 12 else set())
        for file in row["files"].values():
            assert (tmp_path / "page" / file).stat().st_size > 0
    assert (tmp_path / "page" / data["rows"][4]["files"]["original"]).read_bytes() == clips.read(4)


def test_a_condition_chooses_its_rows_and_clips_are_copied_only_if_asked_for(clips, tmp_path, media):
    assert write(clips, tmp_path / "page", media, where="motion >= 9") == 3
    assert [row["name"] for row in read_data(tmp_path / "page")["rows"]][-1] == "picture.png"
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["index.html", "thumbnails"]


def test_texts_cannot_become_markup_and_nothing_is_loaded_from_elsewhere(clips, tmp_path, media):
    write(clips, tmp_path / "page", media)
    text = (tmp_path / "page" / "index.html").read_text()
    assert HOSTILE not in text
    page = Page(text.replace("=>", "").replace("<=", ""))  # operators of scripts, which are text in HTML
    assert len(page.find("script")) == 3
    assert not [attributes for _, attributes in page.elements if "src" in attributes or "onerror" in attributes]
    assert "default-src 'none'" in page.find("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert read_data(tmp_path / "page")["rows"][0]["captions"][0] == HOSTILE


def test_too_many_rows_and_folders_with_files_are_refused(clips, tmp_path, media):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        write(clips, tmp_path, media)
    write_table(tmp_path / "data", [make_row(f"{number}.mp4", b"") for number in range(5001)], parts=1)
    many = MemoryClips(tmp_path / "data", lambda row: b"")
    with pytest.raises(UserError, match=r"5,001 rows.*--where"):
        write(many, tmp_path / "page", media)
    assert not (tmp_path / "page").exists()
