import base64
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.video import Clip, decode

noise = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3)).astype(np.uint8)


def test_a_clip_knows_its_size():
    clip = Clip(noise, fps=2, caption="noise")
    assert (clip.height, clip.width, clip.duration, clip.fps) == (16, 24, 1.5, 2.0)


def test_a_clip_s_repr_is_one_line_with_size_rate_and_caption():
    assert repr(Clip(noise, fps=24000 / 1001, caption="a\nb")) == "Clip(3x16x24, 23.976 fps, 'a b')"
    long = repr(Clip(noise, fps=8, caption="a red circle " * 40))
    assert len(long) < 100
    assert long.endswith(" …')")


def test_a_clip_is_a_sequence_of_its_frames():
    clip = Clip(noise, fps=2)
    assert len(clip) == 3
    for frames in (list(clip), [clip[index] for index in range(3)], np.asarray(clip), clip.frames):
        np.testing.assert_array_equal(frames, noise)
    np.testing.assert_array_equal(clip[-1], noise[2])
    with pytest.raises(IndexError):
        clip[3]
    with pytest.raises(TypeError):
        clip[0, 0]


@pytest.mark.parametrize(
    ("index", "frames", "fps"),
    [
        (slice(1, 3), [1, 2], 6),
        (slice(None, None, 2), [0, 2], 3),
        (slice(None, None, -1), [2, 1, 0], 6),
        (slice(-1, None), [2], 6),
        (slice(2, 9), [2], 6),
    ],
)
def test_a_slice_is_a_clip_with_the_rate_and_the_caption_but_not_the_recipe(index, frames, fps):
    assert Clip(noise, fps=6, caption="noise", recipe={"seed": 0})[index] == Clip(noise[frames], fps, "noise")
    assert not Clip(noise, fps=6, recipe={"seed": 0})[index].recipe


def test_a_slice_without_a_frame_is_refused():
    with pytest.raises(UserError, match=r"\[3:9\] is invalid: it has none of the 3 frames"):
        Clip(noise, fps=6)[3:9]


def test_a_clip_is_an_array_without_a_copy_unless_its_type_is_another():
    clip = Clip(noise, fps=2)
    assert np.asarray(clip) is noise
    assert np.array(clip, copy=False) is noise
    assert not np.shares_memory(np.array(clip), noise)
    assert np.asarray(clip, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="copy"):
        np.array(clip, np.float32, copy=False)
    np.testing.assert_array_equal(jnp.asarray(clip), noise)


def test_clips_are_equal_if_their_frames_rates_and_captions_are():
    clip = Clip(noise, fps=2, caption="noise")
    assert clip == Clip(noise.copy(), fps=2.0, caption="noise", recipe={"seed": 3})
    for other in (Clip(255 - noise, 2, "noise"), Clip(noise, 3, "noise"), Clip(noise, 2), clip[:2], noise.tobytes()):
        assert clip != other


def test_a_clip_whose_frames_can_be_written_to_has_no_hash():
    with pytest.raises(TypeError, match="unhashable"):
        hash(Clip(noise, fps=2))


@pytest.mark.parametrize("frames", [noise[0], noise[:0], noise[..., :2], noise.astype(np.float32), list(noise)])
def test_a_clip_refuses_arrays_that_are_no_frames(frames):
    with pytest.raises(Exception, match=r"(?s)frames"):  # UserError, or the annotation's own check under pytest
        Clip(frames, fps=8)


@pytest.mark.wrong_types
@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf"), None, "8"])
def test_a_clip_refuses_an_impossible_rate(fps):
    with pytest.raises(UserError, match="positive"):
        Clip(noise, fps=fps)


@pytest.mark.parametrize(
    "name", ["clip.mp4", "clip.mov", "clip.webm", "clip.gif", "clip.webp", "clip.apng", "a/new/folder/clip.MP4"]
)
def test_save_chooses_the_format_by_suffix(tmp_path, name):
    Clip(noise, fps=8).save(tmp_path / name)
    back = decode(tmp_path / name)
    assert back.frames.shape == noise.shape
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


@pytest.mark.parametrize("name", ["clip.avi", "clip", ".mp4"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(UserError, match=r"\.mp4, \.mov, \.webm, \.gif, \.webp, \.apng, \.png, \.jpg"):
        Clip(noise, fps=8).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.png"
    Clip(noise[:1], fps=1).save(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="one frame"):
        Clip(noise, fps=8).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("frames", "tag", "kind"),
    [(noise, "<video", "video/mp4"), (noise[:, :15], "<video", "video/webm"), (noise[:1], "<img", "image/png")],
)
def test_a_clip_shows_itself_in_a_notebook(frames, tag, kind):
    page = Clip(frames, fps=8, caption='a "b" <c>')._repr_html_()
    assert page.startswith(tag)
    assert "&quot;b&quot; &lt;c&gt;" in page
    assert int(re.search(r"height:(\d+)px", page)[1]) >= 192
    if tag == "<video":
        assert all(word in page for word in ("autoplay", "loop", "muted"))
    content = re.search(rf'src="data:{kind};base64,([^"]+)"', page)[1]
    assert decode(base64.b64decode(content)).frames.shape == frames.shape
