"""Comparison of evaluations: refused for different protocols, with the best values marked."""

import json
from dataclasses import asdict

import pytest

from dit_video.apps.reports.comparison_report import write_comparison_report
from dit_video.core.errors import MissingError, UserError
from dit_video.evaluation.comparison import compare, format_comparison
from dit_video.evaluation.metrics.metric import MetricDescription

ABOUT = {
    "psnr": MetricDescription(label="PSNR", unit="dB", decimals=1, is_higher_better=True),
    "fvd": MetricDescription(label="FVD", decimals=1, is_higher_better=False),
}


def write_result(folder, values, **protocol):
    record = {
        "protocol": {"config": {"count": 10}, "data": "abc", "weights": {"fvd": ["I3D 12"]}, **protocol},
        "results": [
            {"name": name, "metric": "m", "value": value, "interval": (value - 1, value + 1), "count": 10, "note": ""}
            | asdict(ABOUT[name])
            for name, value in values.items()
        ],
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def test_the_best_values_are_those_whose_intervals_reach_the_best(tmp_path):
    values = ({"psnr": 30.0, "fvd": 100.0}, {"psnr": 31.5, "fvd": 90.0}, {"psnr": 20.0, "fvd": 90.5})
    paths = [write_result(tmp_path / name / "out", each) for name, each in zip("abc", values, strict=True)]
    comparison = compare(paths)
    assert comparison.names == ("a", "b", "c")
    assert comparison.find_best("psnr") == (0, 1)
    assert comparison.find_best("fvd") == (1, 2)
    lines = format_comparison(comparison).splitlines()
    assert lines[1].split("  ")[0] == "PSNR"
    assert "31.5 dB (30.5 dB to 32.5 dB) *" in lines[1]
    assert "20.0 dB (19.0 dB to 21.0 dB) *" not in lines[1]
    assert comparison.steps is None
    assert comparison.to_json()["values"]["fvd"][0] == {"value": 100.0, "interval": [99.0, 101.0], "examples": 10}


def test_checkpoints_of_one_training_become_curves(tmp_path):
    paths = [write_result(tmp_path / f"step_{step}", {"psnr": step / 100}) for step in (2000, 1000, 10000)]
    comparison = compare(paths)
    assert comparison.steps == (2000, 1000, 10000)
    write_comparison_report(tmp_path / "report.html", comparison)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 1
    assert "PSNR" in page


def test_different_protocols_are_refused_with_their_fields(tmp_path):
    first = write_result(tmp_path / "a", {"psnr": 1.0})
    second = write_result(tmp_path / "b", {"psnr": 1.0}, config={"count": 20})
    with pytest.raises(UserError, match=r"a and b are not comparable: protocol\.config\.count is 10 there and 20 here"):
        compare([first, second])


def test_other_weights_are_refused_only_where_they_matter(tmp_path):
    first = write_result(tmp_path / "a", {"psnr": 1.0, "fvd": 2.0})
    second = write_result(tmp_path / "b", {"psnr": 1.0, "fvd": 2.0}, weights={"fvd": ["I3D 99"]})
    with pytest.raises(UserError, match="I3D 12 there and of I3D 99 here"):
        compare([first, second])
    third = write_result(tmp_path / "c", {"psnr": 1.0}, weights={"fvd": ["I3D 99"]})
    comparison = compare([first, third])
    assert comparison.left_out == ("fvd",)


def test_what_is_no_result_is_named(tmp_path):
    first = write_result(tmp_path / "a", {"psnr": 1.0})
    with pytest.raises(UserError, match="at least two"):
        compare([first])
    with pytest.raises(MissingError, match=r"evaluate\.py"):
        compare([first, tmp_path / "b"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.json").write_text('{"results": []}')
    with pytest.raises(UserError, match="no protocol"):
        compare([first, tmp_path / "c"])
    other = write_result(tmp_path / "d", {"fvd": 1.0})
    with pytest.raises(UserError, match="no value in common"):
        compare([first, other])


def test_results_of_other_numbers_of_samples_are_refused(tmp_path):
    first, second = (write_result(tmp_path / name, {"psnr": 1.0}, config={"max_unreadable": 0.1}) for name in "ab")
    for folder, count in ((first, 100), (second, 90)):
        record = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps(record | {"samples": count}))
    assert compare([first, second]).names == ("a", "b")  # ten may be left out
    (second / "metrics.json").write_text(json.dumps(record | {"samples": 89}))
    with pytest.raises(UserError, match=r"samples is 100 there and 89 here.*--count 89"):
        compare([first, second])


@pytest.mark.parametrize(
    "record",
    [[], {"protocol": []}, {"protocol": [], "results": []}, {"protocol": {}, "results": {}}]
    + [{"protocol": {}, "results": [each]} for each in (1, {"name": "psnr"})],
)
def test_damaged_results_are_errors(tmp_path, record):
    good = write_result(tmp_path / "a", {"psnr": 1.0})
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"metrics\.json .*Evaluate again"):
        compare([good, tmp_path])


def test_a_result_is_not_compared_with_itself(tmp_path):
    good = write_result(tmp_path / "a", {"psnr": 1.0})
    with pytest.raises(UserError, match="named twice"):
        compare([good, good / "metrics.json"])
