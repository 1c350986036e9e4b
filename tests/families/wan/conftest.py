"""Small random pipelines of Wan of every kind."""

from dataclasses import replace

import pytest

import dit_video
from support.tiny_wan import ANIMATING, DIT, TWO, write_animating_wan, write_wan


@pytest.fixture(scope="session")
def text_to_video(tmp_path_factory):
    """Return a pipeline like Wan 2.1 of text to video, which is not trained to keep anything."""
    folder = tmp_path_factory.mktemp("t2v") / "wan"
    write_wan(folder, backbone=replace(DIT, layers=1))
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory):
    """Return a pipeline like Wan 2.2 of text to video: of four steps, each expert takes two."""
    folder = tmp_path_factory.mktemp("two") / "wan"
    write_wan(folder, backbone=replace(DIT, layers=1), **TWO)
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="session")
def knowing(tmp_path_factory):
    """Return a pipeline like TI2V-5B, which is trained to keep a first frame, at time 0."""
    folder = tmp_path_factory.mktemp("ti2v") / "wan"
    write_wan(folder, backbone=replace(DIT, layers=1, time="token"))
    return dit_video.load(folder, dtype="float32")


@pytest.fixture(scope="session")
def animating(tmp_path_factory):
    """Return a pipeline like Wan 2.1 of images to videos, which always gets a first frame."""
    folder = tmp_path_factory.mktemp("i2v") / "wan"
    write_animating_wan(folder, backbone=replace(ANIMATING, layers=1))
    return dit_video.load(folder, dtype="float32")


@pytest.fixture
def pipeline(request):
    """Return the pipeline of the name that a test is parametrised with."""
    return request.getfixturevalue(request.param)
