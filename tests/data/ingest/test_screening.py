"""Screening without steps: every file is kept whole."""

import json

import pytest

from dit_video.core import config_json
from dit_video.core.errors import DecodeError
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.ingest.inspection import InspectionConfig
from dit_video.data.ingest.screening import Screening
from dit_video.video import Clip, encode, probe
from support.encoded_clips import encode_resized, make_pattern


@pytest.mark.parametrize("format", ["mp4", "webm", "gif"])
def test_every_file_is_one_shot_that_is_kept(format):
    content = encode(make_pattern(7), format)
    result = Screening().screen(content, "a")
    ((shot, reason, stop, is_cut),) = result.shots
    facts = probe(content)
    assert (shot.name, shot.start, shot.frames, shot.height, shot.hash) == ("a", 0.0, 7, facts.height, None)
    assert (result.facts, reason, is_cut) == (facts, "", False)
    assert stop == pytest.approx(shot.duration)
    assert result == ScreeningConfig().screen(content, "a")


def test_an_image_has_no_length_and_a_damaged_file_or_one_of_two_sizes_no_shot():
    image = encode(Clip(make_pattern(1).frames, fps=1), "png")
    assert Screening().screen(image, "a.png").shots[0].stop == 0
    for content in (b"no video", encode_resized()):
        with pytest.raises(DecodeError):
            Screening().screen(content, "a")


def test_a_screening_travels_as_json_that_names_its_class():
    for screening in (Screening(), ScreeningConfig(duplicates=4)):
        config = InspectionConfig(screening=screening)
        assert config_json.from_json(json.loads(json.dumps(config_json.to_json(config)))) == config


def test_duplicates_are_found_by_a_screening_with_that_step():
    hashes, files = [(1, 2), None, (1, 3), (1, 3)], [0, 1, 2, 0]
    assert Screening().find_duplicates(hashes, files) == {}
    assert ScreeningConfig(duplicates=1).find_duplicates(hashes, files) == {2: 0}
