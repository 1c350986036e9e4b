"""Engines for clusters whose packages are not installed."""

import sys

import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.clusters import make_beam, make_ray


@pytest.mark.parametrize(
    ("make", "package", "message"),
    [
        (make_ray, "ray", r"^Ray is not installed\. Use pip install -e '\.\[ray\]'\.$"),
        (
            make_beam,
            "apache_beam",
            r"^Apache Beam is not installed\. Use pip install -e '\.\[beam\]' in a separate",
        ),
    ],
)
def test_an_engine_that_is_not_installed_is_named_with_the_fix(monkeypatch, make, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=message):
        make()


def test_the_command_says_how_ray_is_installed(tmp_path, script, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = script("tools/ingest.py", tmp_path, tmp_path / "out", "--ray")
    assert ended.code == 2
    assert ended.err.splitlines()[-1] == "error: Ray is not installed. Use pip install -e '.[ray]'."
    assert not (tmp_path / "out").exists()
