"""Statistics of captions."""

import json

from hypothesis import given
from hypothesis import strategies as st

from dit_video.curation.caption_statistics import compute_caption_statistics


def test_caption_statistics_count_words_and_lengths():
    result = compute_caption_statistics(
        [("A dog runs.", "The dog's run"), (), ("a DOG runs.",), ("A dog runs.",), ("  ",)]
    )
    assert result == {
        "clips": 5,
        "captions": 4,
        "uncaptioned": 2,
        "per_clip": ((0, 2), (1, 2), (2, 1)),
        "words": {"least": 3, "q10": 3, "median": 3, "q90": 3, "most": 3, "mean": 3.0},
        "characters": {"least": 11, "q10": 11, "median": 11, "q90": 13, "most": 13, "mean": 11.5},
        "vocabulary": 6,
        "frequent_words": (("a", 3), ("dog", 3), ("runs", 3), ("dog's", 1), ("run", 1), ("the", 1)),
        "distinct": 3,
        "repeated": (("A dog runs.", 2),),
    }


def test_long_and_missing_captions_are_counted():
    none = compute_caption_statistics([(), ()])
    assert (none["captions"], none["words"], none["characters"], none["frequent_words"]) == (0, None, None, ())
    long = compute_caption_statistics([("word " * 20_000,)] * 2)
    assert long["characters"]["most"] == 100_000
    assert long["words"]["most"] == 20_000
    assert long["repeated"] == (("word " * 40 + "…", 2),)


@given(st.lists(st.lists(st.text(max_size=20), max_size=4).map(tuple), max_size=12))
def test_caption_statistics_add_up_and_are_json(captions):
    result = compute_caption_statistics(captions)
    assert sum(count for _, count in result["per_clip"]) == result["clips"] == len(captions)
    assert sum(number * count for number, count in result["per_clip"]) == result["captions"]
    assert sum(count - 1 for _, count in result["repeated"]) <= result["captions"] - result["distinct"]
    text = json.dumps(result, ensure_ascii=True)
    # The order of clips doesn't matter.
    assert text == json.dumps(compute_caption_statistics(captions[::-1]), ensure_ascii=True)
