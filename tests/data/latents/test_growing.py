"""Latents of a data set that changes: what is new is encoded alone, and what is there stays accepted."""

import hashlib

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.offline import encode_latents
from dit_video.data.latents.plan import Augmentations, check_clips, plan_encoding
from dit_video.models.conditioning import ClipConditioning
from dit_video.tokens import Field
from support.offline_clips import MIXED_SIZES, MemorySource, make_encoding, make_source

IDENTITY = {"autoencoder": "a", "text": "t"}


class SplitLength(ClipConditioning):
    """Conditioning on the length of a column's text."""

    columns = ("split",)
    field = Field(name="length", alignment="example")

    def from_clip(self, view):
        return np.asarray(len(view.columns["split"]), np.float32)

    def from_request(self, value, latents):
        return np.asarray(value, np.float32)


class Clips:
    """A data set of clips that changes, and its latents."""

    def __init__(self, folder, **options):
        made = make_source(MIXED_SIZES[:6])
        self.folder, self.infos, self.contents = folder, list(made.infos[:5]), list(made.contents[:5])
        self.spare = made.infos[5], made.contents[5]
        self.embedded = []
        self.encoding = make_encoding(
            encode_text=self.embed, views_per_file=4, augmentations=Augmentations(clips_per_video=2), **options
        )

    def embed(self, caption):
        self.embedded.append(caption)
        values = hashlib.sha256(caption.encode()).digest()[: 4 * (1 + len(caption) % 3)]
        return np.frombuffer(values, np.uint8).reshape(-1, 4).astype(np.float32)

    @property
    def source(self):
        return MemorySource(self.infos, self.contents)

    def change_caption(self, number, *captions):
        self.infos[number] = self.infos[number]._replace(captions=captions)

    def update(self):
        """Encode what is new; return the numbers of the decoded clips, and the captions that were embedded."""
        source, self.embedded = self.source, []
        plan = plan_encoding(source, self.encoding, self.folder)
        assert encode_latents(self.folder, source, self.encoding, plan, identity=IDENTITY)
        check_clips(self.open(), source, self.encoding.columns)
        return sorted(set(source.read)), self.embedded

    def open(self):
        return LatentSource(self.folder, identity=IDENTITY)

    def read(self):
        """Return the latents by their names."""
        latents = self.open()
        return {name: latents[index] for index, name in enumerate(latents.names)}


@pytest.fixture
def clips(tmp_path):
    """Return clips that are encoded."""
    clips = Clips(tmp_path / "l")
    assert clips.update() == ([0, 1, 2, 3, 4], ["", "one", "two, from the left"])
    return clips


def test_nothing_is_encoded_again_if_nothing_has_changed(clips):
    files = {path: path.stat().st_mtime_ns for path in clips.folder.rglob("*.array_record")}
    assert clips.update() == ([], [])
    assert {path: path.stat().st_mtime_ns for path in clips.folder.rglob("*.array_record")} == files


def test_a_changed_caption_decodes_no_clip_and_is_embedded_alone(clips):
    before, latents = clips.open(), clips.read()
    clips.change_caption(1, "one", "three")
    with pytest.raises(
        UserError, match=r"or captions \(0 clips are missing, 1 examples have changed, such as 1\.png\)"
    ):
        check_clips(before, clips.source)
    assert clips.update() == ([], ["three"])
    after = clips.open()
    index = after.names.index("1.png@0")
    assert after.all_captions[index] == ("one", "three")
    np.testing.assert_array_equal(after.read_text(index, 1), clips.embed("three"))
    np.testing.assert_array_equal(after.read_text(index, 0), clips.embed("one"))
    assert after.hash != before.hash
    for name, values in clips.read().items():
        np.testing.assert_array_equal(values, latents[name])
    # The old caption is still there.
    clips.change_caption(1, "two, from the left")
    assert clips.update() == ([], [])
    clips.change_caption(1)
    assert clips.update() == ([], [])
    assert clips.open().all_captions[index] == ()


def test_a_clip_whose_column_changes_is_encoded_alone_where_a_conditioning_reads_it(tmp_path, clips):
    clips.infos[1] = clips.infos[1]._replace(split="validation")
    assert clips.update() == ([], [])
    read = Clips(tmp_path / "read", conditioning=(SplitLength(),))
    assert read.update()[0] == [0, 1, 2, 3, 4]
    before = read.open()
    read.infos[1] = read.infos[1]._replace(split="validation")
    with pytest.raises(UserError, match=r"\(1 clips are missing, 1 examples have changed, such as 1\.png\)"):
        check_clips(before, read.source, ("split",))
    assert read.update()[0] == [1]
    after = read.open()
    lengths = {after.clips[index]: float(after.read_field(index, SplitLength.field)) for index in range(len(after))}
    assert lengths == {info.name: len(info.split) for info in read.infos}


def test_an_added_clip_is_encoded_alone(clips):
    latents = clips.read()
    clips.infos.append(clips.spare[0]._replace(captions=("four",)))
    clips.contents.append(clips.spare[1])
    with pytest.raises(UserError, match=r"\(1 clips are missing, 0 examples have changed, such as 5\.apng"):
        check_clips(clips.open(), clips.source)
    assert clips.update() == ([5], ["four"])
    after = clips.read()
    assert after.keys() - latents.keys() == {name for name in after if name.startswith("5.apng@")} != set()
    for name, values in latents.items():
        np.testing.assert_array_equal(after[name], values)
    assert len(clips.open().skipped) == 0


def test_a_removed_clip_is_no_longer_used_and_may_come_back(clips):
    latents, gone = clips.read(), (clips.infos.pop(2), clips.contents.pop(2))
    with pytest.raises(UserError, match=r"\(0 clips are missing, 1 examples have changed, such as 2\.png\)"):
        check_clips(clips.open(), clips.source)
    assert clips.update() == ([], [])
    assert latents.keys() - clips.read().keys() == {"2.png@0"}
    clips.infos.append(gone[0])
    clips.contents.append(gone[1])
    assert clips.update() == ([], [])
    assert clips.read().keys() == latents.keys()


def test_other_bytes_under_the_same_name_are_encoded_again(clips):
    latents = clips.read()
    clips.contents[0] = clips.contents[2]
    size = {name: getattr(clips.infos[2], name) for name in ("height", "width", "payload")}
    clips.infos[0] = clips.infos[0]._replace(**size)
    with pytest.raises(UserError, match=r"\(1 clips are missing, 1 examples have changed, such as 0\.png"):
        check_clips(clips.open(), clips.source)
    assert clips.update() == ([0], [])
    after = clips.read()
    assert after.keys() == latents.keys()
    np.testing.assert_allclose(after["0.png@0"], latents["2.png@0"], atol=1e-5)


def test_a_clip_that_cannot_be_read_is_tried_once(clips):
    clips.infos.append(clips.spare[0])
    clips.contents.append(b"no clip")
    assert clips.update() == ([5], [])
    assert {skipped.clip for skipped in clips.open().skipped} == {"5.apng"}
    assert clips.update() == ([], [])


def test_an_addition_that_was_killed_leaves_what_was_there_and_continues(clips):
    latents = clips.read()
    for number in range(9):  # more than one file
        clips.infos.append(clips.spare[0]._replace(name=f"more {number}.apng", captions=(f"more {number}",)))
        clips.contents.append(clips.spare[1])
    plan = plan_encoding(clips.source, clips.encoding, clips.folder)
    assert len(plan.files) > 2
    assert not encode_latents(clips.folder, clips.source, clips.encoding, plan, identity=IDENTITY, shard=1, shards=2)
    assert clips.read().keys() == latents.keys()
    canvases = [plan.canvases[canvas] for file in plan.files[1::2] for canvas in file]
    first = {plan.views[slot.clip].clip for canvas in canvases for slot in canvas.slots}
    decoded, _ = clips.update()
    assert set(decoded) == set(range(5, 14)) - first
    assert len(clips.read()) == len(latents) + len(plan.views)
