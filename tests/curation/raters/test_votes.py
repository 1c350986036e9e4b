"""Files of votes, control questions and results."""

import json

import numpy as np
import pytest
from scipy.special import expit

from dit_video.core import config_json
from dit_video.core.errors import MissingError, UserError
from dit_video.curation.raters.vote_statistics import WinRate
from dit_video.curation.raters.votes import TIE, PageKey, format_results, read_votes, summarize_votes
from support.votes import make_entry, make_key, write_votes


def summarize(tmp_path, key, raters, **options):
    """Return the results of raters, whose answers are a function of the pair."""
    paths = [
        write_votes(tmp_path / f"{name}.json", key, name, [make_entry(pair, answer(pair)) for pair in key.pairs])
        for name, answer in raters.items()
    ]
    return summarize_votes(key, read_votes(paths, key), **options)


def get_rates(result):
    names = ("system", "other", "domain")
    return {
        tuple(each[name] for name in names): WinRate(*(each[name] for name in WinRate._fields))
        for each in result["win_rates"]
    }


def test_the_key_is_read_as_it_was_written(tmp_path):
    key = make_key(controls=2)
    key.write(tmp_path / "page.key.json")
    assert PageKey.read(tmp_path / "page.key.json") == key


def test_win_rates_are_of_the_system_whatever_its_side(tmp_path):
    key = make_key(prompts=6)
    results = summarize(tmp_path, key, {"Ada": lambda pair: "a", "Bo": lambda pair: "a" if pair.item < 3 else TIE})
    rates = get_rates(results["questions"]["look"])
    overall = rates["a", "b", "overall"]
    assert overall.value == 0.875
    assert (overall.wins, overall.ties, overall.losses, overall.prompts) == (9, 3, 0, 6)
    assert rates["a", "b", "pets"].prompts == 3
    assert rates["a", "b", "pets"].value == pytest.approx(11 / 12)
    assert rates["a", "b", "sport"].value == pytest.approx(5 / 6)


def test_systems_are_ranked_as_planted(tmp_path):
    key = make_key("abc", prompts=12)
    best = summarize(tmp_path, key, {"Ada": lambda pair: min(pair.systems) if pair.item % 4 else max(pair.systems)})
    scores = best["questions"]["prompt"]["bradley_terry"]
    assert scores["a"]["score"] > scores["b"]["score"] > scores["c"]["score"]
    assert json.loads(json.dumps(best, allow_nan=False))["systems"] == ["a", "b", "c"]
    assert "Bradley–Terry score" in format_results(best)


def test_a_rater_who_fails_controls_is_excluded_with_a_note(tmp_path):
    key = make_key(controls=4)
    raters = {
        "Ada": lambda pair: "a",
        "Bo": lambda pair: "b" if pair.control is None else "wrong",
        "Cy": lambda pair: "a" if pair.name != "c0" else TIE,
    }
    results = summarize(tmp_path, key, raters)
    assert [each["passed"] for each in results["raters"].values()] == [4, 0, 3]
    assert [each["is_excluded"] for each in results["raters"].values()] == [False, True, False]
    assert "4 of 4 control questions failed" in results["raters"]["Bo"]["note"]
    assert get_rates(results["questions"]["look"])["a", "b", "overall"].value == 1
    assert "excluded: 4 of 4" in format_results(results)
    lenient = summarize(tmp_path, key, raters, max_failed_controls=1)
    assert get_rates(lenient["questions"]["look"])["a", "b", "overall"].value == pytest.approx(2 / 3)
    strict = summarize(tmp_path, key, raters, max_failed_controls=0)
    assert strict["raters"]["Cy"]["is_excluded"]
    with pytest.raises(UserError, match=r"max_failed=2.*from 0 to 1"):
        summarize(tmp_path, key, raters, max_failed_controls=2)


def test_agreement_does_not_depend_on_which_system_wins(tmp_path):
    key = make_key(prompts=8)
    same = summarize(tmp_path, key, {"Ada": lambda pair: "a", "Bo": lambda pair: "a"})
    assert same["questions"]["look"]["krippendorff_alpha"] == pytest.approx(1)
    opposite = summarize(tmp_path, key, {"Ada": lambda pair: "a", "Bo": lambda pair: "b"})
    assert opposite["questions"]["look"]["krippendorff_alpha"] < -0.5
    alone = summarize(tmp_path, key, {"Ada": lambda pair: "a"})
    assert alone["questions"]["look"]["krippendorff_alpha"] is None


def test_a_rater_without_controls_is_kept_and_noted(tmp_path):
    results = summarize(tmp_path, make_key(), {"Ada": lambda pair: "a"})
    assert not results["raters"]["Ada"]["is_excluded"]
    assert "no control question" in results["raters"]["Ada"]["note"]
    assert results["questions"]["look"]["bradley_terry"] is None
    assert "Bradley–Terry scores: none" in format_results(results)


def draw_raters(tmp_path, key, count, *, pairs, seed=0):
    """Return the votes of raters, each on some pairs of its own, who prefer systems as `SCORES` say."""
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        drawn = [key.pairs[index] for index in generator.choice(len(key.pairs), pairs, replace=False)]
        scores = np.array([[SCORES[system] for system in pair.systems] for pair in drawn])
        is_first = generator.random(pairs) < expit(scores[:, 0] - scores[:, 1])
        entries = [
            make_entry(pair, pair.systems[0 if first else 1]) for pair, first in zip(drawn, is_first, strict=True)
        ]
        paths.append(write_votes(tmp_path / f"{number}.json", key, f"rater {number}", entries))
    return read_votes(paths, key)


SCORES = {"a": 0.8, "b": 0.0, "c": -0.8}


def test_raters_of_different_pairs_determine_rates_and_scores_together(tmp_path):
    key = make_key("abc", prompts=40)
    results = summarize_votes(key, draw_raters(tmp_path, key, 300, pairs=10))
    assert {each["votes"] for each in results["raters"].values()} == {10}
    question = results["questions"]["look"]
    assert 100 < question["shared_pairs"] <= 120
    rates = get_rates(question)
    planted = {pair: expit(SCORES[pair[0]] - SCORES[pair[1]]) for pair in (("a", "b"), ("a", "c"), ("b", "c"))}
    for pair, expected in planted.items():
        overall = rates[*pair, "overall"]
        low, high = overall.interval
        assert low < expected < high
        assert high - low < 0.1
        assert overall.wins + overall.losses == pytest.approx(1000, abs=100)
    intervals = np.array([each["interval"] for each in question["bradley_terry"].values()])
    assert (intervals[:, 0] < [*SCORES.values()]).all()
    assert (intervals[:, 1] > [*SCORES.values()]).all()
    assert (np.ptp(intervals, axis=1) < 0.4).all()
    # Two raters of a pair differ with probability 2 p (1 - p), and by chance in half of the cases.
    differences = [2 * p * (1 - p) for p in planted.values()]
    assert question["krippendorff_alpha"] == pytest.approx(1 - 2 * np.mean(differences), abs=0.05)


def test_agreement_is_that_of_the_pairs_that_raters_share(tmp_path):
    key = make_key(prompts=9)

    def write(name, numbers, answer):
        entries = [make_entry(key.pairs[number], answer(key.pairs[number])) for number in numbers]
        return write_votes(tmp_path / f"{name}.json", key, name, entries)

    def summarize_pairs(*parts):
        paths = [write(name, numbers, answer) for name, numbers, answer in parts]
        return summarize_votes(key, read_votes(paths, key))["questions"]["look"]

    def answer(pair):
        return "a" if pair.item % 4 else TIE

    def opposite(pair):
        return "b"

    shared = summarize_pairs(("Ada", range(5), answer), ("Bo", range(5), opposite))
    apart = summarize_pairs(("Ada", range(7), answer), ("Bo", [0, 1, 2, 3, 4, 7, 8], opposite))
    assert (shared["shared_pairs"], apart["shared_pairs"]) == (5, 5)
    assert apart["krippendorff_alpha"] == shared["krippendorff_alpha"] < 0
    assert get_rates(apart)["a", "b", "overall"].wins > get_rates(shared)["a", "b", "overall"].wins
    alone = summarize_pairs(("Ada", range(5), answer), ("Bo", range(5, 9), answer))
    assert (alone["shared_pairs"], alone["krippendorff_alpha"]) == (0, None)
    assert alone["left_win_rate"]["prompts"] == 9


def test_raters_without_shared_pairs_or_with_equal_answers_have_no_agreement(tmp_path):
    key = make_key(prompts=3)
    alone = summarize(tmp_path, key, {"Ada": lambda pair: "a"})
    assert "no two raters voted on one pair" in format_results(alone)
    equal = summarize(tmp_path, key, {"Ada": lambda pair: TIE, "Bo": lambda pair: TIE})
    assert "all answers are equal" in format_results(equal)
    assert "shared pairs" in format_results(summarize(tmp_path, key, {"Ada": lambda pair: "a", "Bo": lambda pair: TIE}))


def test_an_unfinished_rater_counts_with_the_votes_there_are(tmp_path):
    key = make_key()
    path = write_votes(tmp_path / "v.json", key, " Ada  L ", [make_entry(key.pairs[0], "b")])
    results = summarize_votes(key, read_votes([path], key))
    assert results["raters"]["Ada L"]["votes"] == 1
    assert get_rates(results["questions"]["look"])["a", "b", "overall"].value == 0
    empty = summarize_votes(key, read_votes([write_votes(tmp_path / "w.json", key, "Bo", [])], key))
    assert get_rates(empty["questions"]["look"])["a", "b", "overall"].value is None
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
    whole = config_json.to_json(KEY)
    for document, match in (
        ({"votes": []}, "no key"),
        (whole | {"seed": "0"}, "damaged key"),
        (whole | {"pairs": [{}]}, "damaged key"),
        (whole | {"systems": ["a"]}, "b is none of its systems"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(UserError, match=rf"page\.key\.json.*{match}"):
            PageKey.read(path)
