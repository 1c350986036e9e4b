"""WebDataset: listings of tars; damaged or hostile ones lose nothing silently."""

import io
import json
import random
import re
import tarfile
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.engine import IngestConfig, plan_ingest
from dit_video.data.ingest.formats import list_clips
from dit_video.data.ingest.formats.tars import _get_key
from support.clip_folders import get_captions
from support.hostile_files import write_sparse_tar

Entry = tuple[str, bytes] | tarfile.TarInfo


def make_tar(entries: Iterable[Entry], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", encoding="utf-8", errors="surrogateescape", **options) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return file.getvalue()


def write_tar(path: Path, entries: Iterable[Entry], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_tar(entries, **options))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_clips_of_a_tar_are_read_in_place(tmp_path, format):
    long = "x" * 60 + "/" + "y" * 95
    path = write_tar(
        tmp_path / "shard.tar",
        [
            special("./", tarfile.DIRTYPE),
            ("./0001.mp4", b"bytes of one"),
            ("./0001.txt", "\ufeffone \n".encode()),
            ("./0001.json", json.dumps({"caption": "one", "captions": ["uno"], "status": "success"}).encode()),
            ("a.b/0002.MP4", b""),
            ("0003.caption", b"before its clip"),
            ("0003.left.webm", b"left"),
            ("0003.right.webm", b"right"),
            ("0003.right.txt", b"on the right"),
            ("0003.meta.json", b"not a caption"),
            ("0003.cls", b"7"),
            (".hidden.mp4", b""),
            ("__MACOSX/._0001.mp4", b""),
            (f"{long}.gif", b"long"),
            (f"{long}.txt", b"of a long name"),
        ],
        format=format,
    )
    listing = list_clips(path)
    assert get_captions(listing) == {
        "0001.mp4": ("one", "uno"),
        "a.b/0002.MP4": (),
        "0003.left.webm": ("before its clip",),
        "0003.right.webm": ("on the right", "before its clip"),
        f"{long}.gif": ("of a long name",),
    }
    assert next(iter(get_captions(listing))) == "0001.mp4"
    assert (listing.format, listing.unlisted, listing.rejected) == ("webdataset", (), ())
    assert [clip.read() for clip in listing.clips] == [b"bytes of one", b"", b"left", b"right", b"long"]
    assert all(clip.path == str(path) and clip.offset % 512 == 0 for clip in listing.clips)


@pytest.mark.parametrize("name", ["a.mp4", "a.b.mp4", "x.y/a.b.c.mp4", "x/y z/0.left.webm", "é/日.gif"])
def test_keys_are_those_of_webdataset(name):
    rule = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)  # WebDataset's base_plus_ext
    assert rule is not None
    assert _get_key(name) == rule.group(1)


def test_a_folder_of_shards_is_listed_in_order(tmp_path):
    write_tar(tmp_path / "b" / "0.tar", [("1.mp4", b"second"), ("1.txt", b"2")])
    write_tar(tmp_path / "a.TAR", [("1.mp4", b"first"), ("1.txt", b"1")])
    (tmp_path / "README.txt").write_text("shards")
    listing = list_clips(tmp_path)
    assert get_captions(listing) == {"a.TAR/1.mp4": ("1",), "b/0.tar/1.mp4": ("2",)}
    assert [clip.read() for clip in listing.clips] == [b"first", b"second"]
    assert (listing.format, listing.rejected) == ("webdataset", ())
    (tmp_path / "loose.mp4").write_bytes(b"")
    listing = list_clips(tmp_path, format="webdataset")
    assert (len(listing.clips), listing.unlisted) == (2, ("loose.mp4",))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.yaml", b"x"),
        ("a.json", b'{"description": "x"}'),
        ("metadata.csv", b"file_name,text\na.mp4,x"),
        ("a.info.json", b'{"caption": "x"}'),
        ("a.prompt.txt", b"x"),
        ("a.text", b"x"),
    ],
)
@pytest.mark.parametrize("is_folder", [False, True])
def test_members_that_are_not_read_are_named_where_no_clip_has_a_caption(tmp_path, name, content, is_folder):
    source = write_tar(tmp_path / "tars" / "t.tar", [("a.mp4", b""), (name, content), ("README.md", b"x")])
    unlisted = [name]
    if is_folder:
        source, unlisted = source.parent, ["captions.csv", f"t.tar/{name}"]
        (source / "captions.csv").write_text("file_name,text\na.mp4,x")
    told = f"no clip of {source} has a caption, and these files are not read: {', '.join(unlisted)}; .* to .txt files"
    with pytest.warns(UserWarning, match=told):
        folder = plan_ingest(source, tmp_path / "data", config=IngestConfig())
    found = folder.read_skipped()["unlisted"]
    assert [each for each in found if not each.endswith("README.md")] == unlisted
    write_tar(tmp_path / "tars" / "t.tar", [("a.mp4", b""), (name, content), ("a.caption", b"y")])
    assert list_clips(source).unlisted == ()


def test_hostile_entries_are_rejected(tmp_path):
    latin = "\udce9.mp4"
    entries = [
        ("good.mp4", b"good"),
        ("../up.mp4", b""),
        ("a/../../up.txt", b""),
        ("/etc/root.mp4", b""),
        ("a/../inside.mp4", b"inside"),
        special("soft.mp4", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.mp4", tarfile.LNKTYPE, "good.mp4"),
        special("soft", tarfile.SYMTYPE, "../.."),
        special("pipe.mp4", tarfile.FIFOTYPE),
        ("good.mp4", b"again"),
        ("./good.mp4", b"and again"),
        ("good.txt", b"kept"),
        ("good.txt", b"not kept"),
        (latin, b""),
        ("orphan.txt", b"of nothing"),
        ("latin.mp4", b""),
        ("latin.txt", "été".encode("latin-1")),
        ("long.mp4", b""),
        ("long.txt", b"x" * 100_000),
        ("json.mp4", b""),
        ("json.json", b"{"),
        ("huge.mp4", b""),
        ("huge.json", b" " * ((16 << 20) + 1)),
        ("nothing.mp4", b""),
        ("nothing.txt", b" "),
    ]
    listing = list_clips(write_tar(tmp_path / "s.tar", entries))
    assert get_captions(listing) == {"good.mp4": ("kept",), "inside.mp4": (), "nothing.mp4": ()}
    assert listing.clips[0].read() == b"good"
    reasons = list(listing.rejected)
    assert reasons == [
        ("../up.mp4", "its path lies outside of the tar"),
        ("a/../../up.txt", "its path lies outside of the tar"),
        ("/etc/root.mp4", "its path lies outside of the tar"),
        ("soft.mp4", "is a link to '/etc/passwd'"),
        ("hard.mp4", "is a link to 'good.mp4'"),
        ("soft", "is a link to '../..'"),
        ("pipe.mp4", "is not a regular file"),
        ("good.mp4", "another entry before it has the same name"),
        ("./good.mp4", "another entry before it has the same name"),
        ("good.txt", "another entry before it has the same name"),
        ("\\udce9.mp4", "its name is not UTF-8; rename it"),
        ("latin.mp4", "'latin.txt' is not UTF-8 (invalid continuation byte at byte 0)"),
        ("long.mp4", "its caption has 100,000 bytes, 65,536 is the limit"),
        (
            "json.mp4",
            "'json.json' is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        ("huge.mp4", "'huge.json' has 16,777,217 bytes, 16,777,216 is the limit of a caption file"),
        ("orphan.txt", "no video or image has its key"),
    ]
    # Media entries: every one is either listed or rejected.
    counted = [name for name, _ in reasons if name.endswith(".mp4")]
    assert len(listing.clips) + len(counted) == sum(
        (entry.name if isinstance(entry, tarfile.TarInfo) else entry[0]).endswith(".mp4") for entry in entries
    )


GOOD = [(f"{i}.mp4", bytes([i]) * 700) for i in range(5)]


@pytest.mark.parametrize(
    ("damage", "kept", "reason"),
    [
        (lambda tar: tar[:4000], 2, "ends after the tar's end; the tar is truncated"),
        (lambda tar: tar[: 3 * 1536], 3, "no end mark at byte 4608: the tar is truncated"),
        (lambda tar: tar[: 3 * 1536 + 100], 3, "no end mark at byte 4608"),
        (lambda tar: tar[:3072] + b"\xff" * 512 + tar[3584:], 2, "no entry begins at byte 3072"),
        (lambda tar: tar[:3072] + b"\0" * 512 + tar[3584:], 2, "more data after the end at byte 3072"),
        (lambda tar: tar + tar, 5, "more data after the end at byte 7680"),
    ],
)
def test_a_damaged_tar_keeps_what_comes_before(tmp_path, damage, kept, reason):
    (tmp_path / "s.tar").write_bytes(damage(make_tar(GOOD)))
    for source, prefix in ((tmp_path / "s.tar", ""), (tmp_path, "s.tar/")):
        listing = list_clips(source)
        assert [clip.name for clip in listing.clips] == [f"{prefix}{i}.mp4" for i in range(kept)]
        assert [clip.read() for clip in listing.clips] == [content for _, content in GOOD[:kept]]
        assert any(reason in why for _, why in listing.rejected), listing.rejected
        assert {name for name, _ in listing.rejected} <= {"s.tar", f"{prefix}{kept}.mp4"}


def test_a_negative_size_does_not_hang(tmp_path):
    """Python's reader had an endless loop (CVE-2025-8194)."""
    for size in (b"\xff" * 12, b"\xff" * 10 + b"\xf6\x00"):
        tar = bytearray(make_tar(GOOD))
        header = tar[1536:2048]
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        tar[1536:2048] = header
        (tmp_path / "s.tar").write_bytes(tar)
        listing = list_clips(tmp_path / "s.tar")
        assert [clip.name for clip in listing.clips][:1] == ["0.mp4"]
        assert any(name == "s.tar" and "damaged" in why for name, why in listing.rejected)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz"])
def test_compressed_tars_are_refused(tmp_path, mode, name):
    with tarfile.open(tmp_path / name, f"w:{mode}"):
        pass
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=r"is compressed \(.*; .* unpack it to a plain \.tar"):
            list_clips(source)


def test_a_plain_tar_with_the_name_of_a_compressed_one_is_read(tmp_path):
    assert len(list_clips(write_tar(tmp_path / "s.tgz", GOOD)).clips) == 5


@pytest.mark.parametrize("content", [b"", b"not a tar", b"x" * 5000])
def test_a_file_that_is_no_tar_is_rejected(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"none of the 1 entries .*a\.tar: is not a tar"):
        list_clips(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", GOOD)
    listing = list_clips(tmp_path)
    assert len(listing.clips) == 5
    assert [name for name, _ in listing.rejected] == ["a.tar"]
    with pytest.raises(UserError, match="holds no clips"):
        list_clips(write_tar(tmp_path / "empty" / "c.tar", []))


def test_a_sparse_entry_is_rejected(tmp_path):
    """Its bytes are not contiguous."""
    header = bytearray(make_tar([("s.mp4", b"x" * 512)], format=tarfile.GNU_FORMAT)[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410], header[483:495] = b"%011o\0" % 512, b"%011o\0" % 512, b"%011o\0" % 4096
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + b"x" * 512 + make_tar(GOOD))
    listing = list_clips(tmp_path / "s.tar")
    assert len(listing.clips) == 5
    ((name, reason),) = listing.rejected
    assert name == "s.mp4"
    assert "sparse" in reason


def test_mutated_tars_neither_crash_nor_hang(tmp_path):
    """All listed clips are inside the file."""
    chosen = random.Random(0)
    entries = [(f"{i}.{suffix}", bytes(chosen.randbytes(300))) for i in range(3) for suffix in ("mp4", "txt", "json")]
    originals = [make_tar(entries, format=format) for format in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT)]
    originals += [make_tar([("é" * 200 + ".mp4", b"x"), *entries], format=tarfile.GNU_FORMAT)]
    path = tmp_path / "s.tar"
    listed, messages = 0, []
    for _ in range(1000):
        tar = bytearray(chosen.choice(originals))
        for _ in range(chosen.randint(1, 8)):
            offset = chosen.randrange(len(tar))
            match chosen.randrange(3):
                case 0:
                    tar[offset] ^= 1 << chosen.randrange(8)
                case 1:
                    del tar[offset : offset + chosen.randint(1, 600)]
                case 2:
                    tar[offset:offset] = tar[chosen.randrange(len(tar)) :][: chosen.randint(1, 600)]
            if not tar:
                break
        path.write_bytes(tar)
        try:
            listing = list_clips(path)
        except UserError as error:
            messages.append(str(error))
            continue
        listed += len(listing.clips)
        assert len({clip.name for clip in listing.clips}) == len(listing.clips)
        for clip in listing.clips:
            assert len(clip.read()) == clip.size
            clip.name.encode()
    assert listed > 500
    assert not [message for message in messages if "\n" in message]


def test_tars_in_folders_of_splits_have_clips_of_these_splits(tmp_path):
    for folder in ("train", "val", "other"):
        write_tar(tmp_path / folder / "0.tar", [("a.mp4", b""), ("a.txt", folder.encode())])
    listing = list_clips(tmp_path)
    assert {clip.captions[0]: clip.split for clip in listing.clips} == {
        "train": "train",
        "val": "validation",
        "other": "train",
    }


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_claims_a_gigabyte_is_not_read(tmp_path, kind):
    write_sparse_tar(tmp_path / "claims.tar", kind)
    reason = r"claims\.tar: is not a tar \(the headers of an entry have more than 1,048,576 bytes"
    tracemalloc.start()
    with pytest.raises(UserError, match=reason):
        list_clips(tmp_path / "claims.tar")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20
