"""Files of votes, control questions and results."""

import dataclasses
import json

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.evaluation.votes import PageKey, read_votes, summarize_votes
from dit_video.evaluation.votes.page_key import TIE
from dit_video.evaluation.votes.table import format_results
from support.votes import make_entry, make_key, write_votes


def summarize(tmp_path, key, raters, **options):
    """Return the results of raters, whose answers are a function of the pair."""
    paths = [
        write_votes(tmp_path / f"{name}.json", key, name, [make_entry(pair, answer(pair)) for pair in key.pairs])
        for name, answer in raters.items()
    ]
    return summarize_votes(key, read_votes(paths, key), **options)


def get_rates(result):
    return {(each.system, each.other, each.domain): each.win_rate for each in result.comparisons}


def test_the_key_is_read_as_it_was_written(tmp_path):
    key = make_key(controls=2)
    key.write(tmp_path / "page.key.json")
    assert PageKey.read(tmp_path / "page.key.json") == key


def test_win_rates_are_of_the_system_whatever_its_side(tmp_path):
    key = make_key(prompts=6)
    results = summarize(tmp_path, key, {"Ada": lambda pair: "a", "Bo": lambda pair: "a" if pair.item < 3 else TIE})
    rates = get_rates(results.questions["look"])
    overall = rates["a", "b", "overall"]
    assert overall.value == 0.875
    assert (overall.wins, overall.ties, overall.losses, overall.prompts) == (9, 3, 0, 6)
    assert rates["a", "b", "pets"].prompts == 3
    assert rates["a", "b", "pets"].value == pytest.approx(11 / 12)
    assert rates["a", "b", "sport"].value == pytest.approx(5 / 6)


def test_systems_are_ranked_as_planted(tmp_path):
    key = make_key("abc", prompts=12)
    best = summarize(tmp_path, key, {"Ada": lambda pair: min(pair.systems) if pair.item % 4 else max(pair.systems)})
    scores = best.questions["prompt"].scores.scores
    assert scores[0] > scores[1] > scores[2]
    document = best.to_json()
    assert json.loads(json.dumps(document, allow_nan=False))["systems"] == ["a", "b", "c"]
    assert document["questions"]["prompt"]["bradley_terry"]["a"]["score"] == scores[0]
    assert "Bradley–Terry score" in format_results(best)


def test_a_rater_who_fails_controls_is_excluded_with_a_note(tmp_path):
    key = make_key(controls=4)
    raters = {
        "Ada": lambda pair: "a",
        "Bo": lambda pair: "b" if pair.control is None else "wrong",
        "Cy": lambda pair: "a" if pair.name != "c0" else TIE,
    }
    results = summarize(tmp_path, key, raters)
    assert [each.passed for each in results.raters.values()] == [4, 0, 3]
    assert [each.is_excluded for each in results.raters.values()] == [False, True, False]
    assert "4 of 4 control questions failed" in results.raters["Bo"].note
    assert get_rates(results.questions["look"])["a", "b", "overall"].value == 1
    assert "excluded: 4 of 4" in format_results(results)
    lenient = summarize(tmp_path, key, raters, max_failed_controls=1)
    assert get_rates(lenient.questions["look"])["a", "b", "overall"].value == pytest.approx(2 / 3)
    strict = summarize(tmp_path, key, raters, max_failed_controls=0)
    assert strict.raters["Cy"].is_excluded
    with pytest.raises(UserError, match=r"max_failed=2.*from 0 to 1"):
        summarize(tmp_path, key, raters, max_failed_controls=2)


def test_agreement_does_not_depend_on_which_system_wins(tmp_path):
    key = make_key(prompts=8)
    same = summarize(tmp_path, key, {"Ada": lambda pair: "a", "Bo": lambda pair: "a"})
    assert same.questions["look"].agreement == pytest.approx(1)
    opposite = summarize(tmp_path, key, {"Ada": lambda pair: "a", "Bo": lambda pair: "b"})
    assert opposite.questions["look"].agreement < -0.5
    alone = summarize(tmp_path, key, {"Ada": lambda pair: "a"})
    assert alone.questions["look"].agreement is None


def test_a_rater_without_controls_is_kept_and_noted(tmp_path):
    results = summarize(tmp_path, make_key(), {"Ada": lambda pair: "a"})
    assert not results.raters["Ada"].is_excluded
    assert "no control question" in results.raters["Ada"].note
    assert results.questions["look"].scores is None
    assert "Bradley–Terry scores: none" in format_results(results)


def test_an_unfinished_rater_counts_with_the_votes_there_are(tmp_path):
    key = make_key()
    path = write_votes(tmp_path / "v.json", key, " Ada  L ", [make_entry(key.pairs[0], "b")])
    results = summarize_votes(key, read_votes([path], key))
    assert results.raters["Ada L"].votes == 1
    assert get_rates(results.questions["look"])["a", "b", "overall"].value == 0
    empty = summarize_votes(key, read_votes([write_votes(tmp_path / "w.json", key, "Bo", [])], key))
    assert get_rates(empty.questions["look"])["a", "b", "overall"].value is None
    assert "no votes" in format_results(empty)


KEY = make_key()
GOOD = make_entry(KEY.pairs[0], "a")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([GOOD, GOOD], "votes once"),
        ([{**GOOD, "pair": "p99"}], "pair='p99'.*no such pair"),
        ([{**GOOD, "pair": ["p0"]}], "no such pair"),
        ([7], "no such pair"),
        ([{**GOOD, "look": KEY.pairs[1].sides[0]}], "look=.*side of the pair"),
        ([{**GOOD, "look": ["tie"]}], "look=.*side of the pair"),
        ([{**GOOD, "prompt": None}], "prompt=None.*side of the pair"),
        ([{**GOOD, "left": "x"}], "left='x'"),
        ([{**GOOD, "seconds": -1}], "seconds=-1"),
        ([{**GOOD, "seconds": True}], "seconds=True"),
        ([{**GOOD, "seconds": float("nan")}], "seconds=nan"),
    ],
)
def test_an_invalid_vote_is_an_error_that_names_the_file(tmp_path, entries, match):
    path = write_votes(tmp_path / "bad.json", KEY, "Ada", entries)
    with pytest.raises(UserError, match=rf"bad\.json.*{match}"):
        read_votes([path], KEY)


def test_votes_of_another_page_and_damaged_files_are_errors_that_name_the_file(tmp_path):
    other = write_votes(tmp_path / "other.json", KEY, "Ada", [GOOD], page="another")
    with pytest.raises(UserError, match=r"other\.json: page='another'.*one page"):
        read_votes([other], KEY)
    nameless = write_votes(tmp_path / "nameless.json", KEY, " ", [GOOD])
    with pytest.raises(UserError, match=r"nameless\.json: rater=' '"):
        read_votes([nameless], KEY)
    for text, match in (('{"votes": [', "not valid JSON"), ("[]", "no file of votes"), ('{"format": 1}', "no file of")):
        (tmp_path / "damaged.json").write_text(text)
        with pytest.raises(UserError, match=rf"damaged\.json.*{match}"):
            read_votes([tmp_path / "damaged.json"], KEY)
    with pytest.raises(MissingError, match=r"absent\.json"):
        read_votes([tmp_path / "absent.json"], KEY)
    with pytest.raises(UserError, match="results need a file of votes"):
        read_votes([], KEY)


def test_a_rater_with_two_files_is_an_error_that_names_both(tmp_path):
    paths = [write_votes(tmp_path / f"{n}.json", KEY, n, [GOOD]) for n in ("Ada", "ADA")]
    with pytest.raises(UserError, match=r"ADA\.json.*Ada\.json.*newer file"):
        read_votes(paths, KEY)


def test_a_damaged_key_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "page.key.json"
    entry = dataclasses.asdict(KEY.pairs[0])
    for document, match in (
        ({"votes": []}, "no key"),
        ({"format": 1, "page": "page", "systems": ["a"], "seed": 0, "pairs": [{}]}, "damaged key"),
        ({"format": 1, "page": "page", "systems": ["a"], "seed": 0, "pairs": [entry]}, "b is none of its systems"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(UserError, match=rf"page\.key\.json.*{match}"):
            PageKey.read(path)
