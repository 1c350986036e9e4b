"""The judge of samples of emoji: what it must tell from true clips that are changed, and from false ones."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.core.resize import resize
from dit_video.data.ingest.engine import ingest
from dit_video.emoji.gallery import Gallery
from dit_video.emoji.loops import find_period, measure_motion, measure_seam
from dit_video.emoji.protocols import EMOJI_METRICS, EmojiProtocol
from dit_video.emoji.source import find_files, prepare, write_columns
from dit_video.evaluation.clip_set import open_clip_set
from dit_video.evaluation.metrics.metric import MetricBatch
from dit_video.evaluation.protocol import EvaluationData
from dit_video.evaluation.protocols import PROTOCOLS
from dit_video.video import Clip
from tests.support.drawn_emoji import STEMS, write_emoji

pytest.importorskip("emoji")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    (folder / "drawn").mkdir()
    drawn = write_emoji(folder / "drawn")
    preparation = prepare(find_files(drawn, drawn), folder / "clips", seed=0, workers=0)
    ingest(folder / "clips", folder / "data")
    write_columns(folder / "data", preparation)
    return folder / "data"


@functools.cache
def open_data(dataset, **fields):
    protocol = replace(PROTOCOLS["emoji"], background="white", **fields)
    return protocol.make_data(EvaluationData(open_clip_set(dataset)))


def change(frames, kind, generator):
    """Return frames that still show the same emoji and motion."""
    t, h, w, _ = frames.shape
    if kind == "noise":
        return np.clip(frames + generator.normal(0, 10, frames.shape), 0, 255).astype(np.uint8)
    if kind == "shifted":
        padded = np.pad(frames, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
        return padded[:, 1 : 1 + h, 6 : 6 + w]
    if kind == "scaled":
        return np.pad(resize(frames, h - 6, w - 6), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    if kind == "later" and t > 1:
        loop = np.roll(frames[:-1], 3, axis=0)
        return np.concatenate([loop, loop[:1]])
    if kind == "blurred":
        return resize(resize(frames, h // 3, w // 3), h, w)
    return frames


def measure(data, samples):
    """Return the value of each metric by its name."""
    clips = data.clips
    references = [clips.read(number, None) for number in range(len(clips.names))]
    batch = MetricBatch(samples=samples, references=references, scenes=clips.truths)
    values = {}
    for metric in EMOJI_METRICS:
        values |= metric.compute(metric.update(metric.init(), batch.select(metric.needs)))
    return {name: value.value for name, value in values.items()}


def make_samples(data, function):
    clips = data.clips
    frames = [clips.read(number, None).frames for number in range(len(clips.names))]
    return [Clip(function(number, frames), fps=8) for number in range(len(frames))]


@pytest.mark.parametrize(
    ("kind", "side"),
    [("same", 48), ("same", 128), *((kind, 96) for kind in ("noise", "shifted", "scaled", "later", "blurred"))],
)
def test_true_emoji_are_recognised_however_they_are_changed(dataset, kind, side):
    data, generator = open_data(dataset, side=side), np.random.default_rng(0)
    samples = make_samples(data, lambda number, frames: change(frames[number], kind, generator))
    values = measure(data, samples)
    assert values.pop("emoji_seen_distance") < 25
    assert values == dict.fromkeys(values, 1.0)
    assert len(values) == 5


def test_emoji_of_other_names_fail_by_name(dataset):
    data = open_data(dataset)
    samples = make_samples(data, lambda number, frames: frames[(number + 7) % len(frames)])
    values = measure(data, samples)
    assert values["emoji_names"] <= 0.2
    assert values["emoji_matches"] == 0


def test_grey_fails_by_name(dataset):
    data = open_data(dataset)
    samples = make_samples(data, lambda number, frames: np.full_like(frames[number], 128))
    values = measure(data, samples)
    assert values["emoji_matches"] <= 0.2
    assert values["emoji_motion"] == 0


@pytest.mark.parametrize("control", ["frozen", "shuffled", "faster"])
def test_a_wrong_motion_fails_by_motion(dataset, control):
    data, generator = open_data(dataset), np.random.default_rng(0)

    def spoil(number, frames):
        clip = frames[number]
        if control == "frozen":
            return np.repeat(clip[:1], len(clip), axis=0)
        order = (
            generator.permutation(len(clip))
            if control == "shuffled"
            else np.arange(len(clip)) * 2 % (len(clip) - 1 or 1)
        )
        return clip[order]

    samples = make_samples(data, spoil)
    assert measure(data, samples)["emoji_motion"] == 0


def test_copies_are_told_from_emoji_that_were_never_seen(dataset):
    seen, unseen = open_data(dataset), open_data(dataset, kind="tone")
    clips = [make_samples(data, lambda number, frames: frames[number]) for data in (seen, unseen)]
    copies = [measure(*pair)["emoji_seen_distance"] for pair in zip((seen, unseen), clips, strict=True)]
    assert copies[0] < 2  # resized twice
    assert copies[1] > 4


def test_samples_have_the_sizes_of_the_emoji_and_prompts_of_their_language(dataset):
    data = open_data(dataset, side=64, captions="captions_de")
    assert set(data.clips.captions) >= {"feuerwehrfrau dunkle hautfarbe"}
    for number in range(len(data.clips.names)):
        clip = data.clips.read(number, None)
        assert data.clips.get_size(number) == clip.frames.shape[:3]
        assert clip.frames.shape[1:3] == (64, 64)
        assert (clip.frames[:, 0, 0] == 255).all()
    counts = [len(open_data(dataset, kind=kind).clips.names) for kind in ("seen", "tone", "person")]
    assert sum(counts) == len(STEMS)


def test_data_without_emoji_is_refused(dataset, tmp_path):
    Clip(np.zeros((5, 16, 16, 3), np.uint8), fps=8).save(tmp_path / "clips" / "a.mp4")
    ingest(tmp_path / "clips", tmp_path / "data")
    with pytest.raises(UserError, match="has no column base"):
        open_data(tmp_path / "data")
    with pytest.raises(UserError, match="needs clips of the data"):
        EmojiProtocol(name="emoji", metrics=()).make_data(None)


def test_emoji_that_look_the_same_count_as_the_same():
    flag, other = (np.full((1, 48, 48, 3), value, np.uint8) for value in (40, 200))
    gallery = Gallery([flag, other, flag.copy()])
    assert gallery.is_same(0, 2)
    assert not gallery.is_same(0, 1)
    assert gallery.find_nearest(flag).distance == 0
    assert gallery.find_nearest(flag, exclude=[0, 2]).number == 1


# --- loops ------------------------------------------------------------------------------------------------------------


def make_loop(frames, periods):
    """Return a bright bar that goes round so many times."""
    clip = np.zeros((frames + 1, 8, 48, 3), np.uint8)
    for number in range(frames + 1):
        start = round(48 * periods * number / frames) % 48
        clip[number, :, np.arange(start, start + 8) % 48] = 255
    return clip


@pytest.mark.parametrize(("frames", "periods"), [(24, 1), (24, 2), (24, 3), (16, 1), (32, 4)])
def test_the_period_is_that_of_the_shortest_repetition(frames, periods):
    clip = make_loop(frames, periods)
    assert find_period(clip) == frames // periods
    assert measure_seam(clip) == 0
    assert measure_motion(clip) > 0


def test_a_jump_at_the_seam_is_told():
    clip = make_loop(24, 1)
    assert measure_seam(clip[:-1]) == pytest.approx(1, abs=0.01)  # one step from the start
    assert measure_seam(clip[:13]) > 1.5
    still = np.repeat(clip[:1], 9, axis=0)
    assert measure_seam(still) == measure_motion(still) == 0
    assert measure_motion(clip[:1]) == 0
    still[-1] = 0
    assert measure_seam(still) == np.inf
