import base64
import re

import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.video import Clip, decode

noise = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3)).astype(np.uint8)


def test_a_clip_knows_its_size():
    clip = Clip(noise, fps=2, caption="noise")
    assert (clip.height, clip.width, clip.duration, clip.fps) == (16, 24, 1.5, 2.0)


@pytest.mark.parametrize("frames", [noise[0], noise[:0], noise[..., :2], noise.astype(np.float32)])
def test_a_clip_refuses_arrays_that_are_no_frames(frames):
    with pytest.raises(Exception, match=r"(?s)frames"):  # UserError, or the annotation's own check under pytest
        Clip(frames, fps=8)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_refuses_an_impossible_rate(fps):
    with pytest.raises(UserError, match="positive"):
        Clip(noise, fps=fps)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.apng", "a/new/folder/clip.MP4"])
def test_save_chooses_the_format_by_suffix(tmp_path, name):
    Clip(noise, fps=8).save(tmp_path / name)
    back = decode(tmp_path / name)
    assert back.frames.shape == noise.shape
    assert [path.name for path in (tmp_path / name).parent.iterdir()] == [(tmp_path / name).name]


@pytest.mark.parametrize("name", ["clip.avi", "clip", ".mp4"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(UserError, match=r"\.mp4, \.webm, \.gif, \.png, \.apng"):
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
