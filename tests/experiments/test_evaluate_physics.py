"""evaluate.py by the protocols of physics, as a user starts it."""

import json

import pytest

import dit_video.scenes.protocols  # noqa: F401, registers its protocols
from dit_video.evaluation.protocols import PROTOCOLS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["physics", "physics_extension"])
def test_a_model_of_other_data_keeps_no_law(name, tmp_path, script):
    """The model of coloured shapes knows neither falls nor contacts, but it can be sampled and measured."""
    arguments = ("--out", tmp_path, "--protocol", name, "--count", 4, "--steps", 2)
    done = script("experiments/evaluate.py", "experiments/pretrained/shapes", *arguments)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / name / "metrics.json").read_text())
    assert {each["name"]: (each["value"], each["count"]) for each in record["results"]} == {
        value: (0.0, 1) for metric in PROTOCOLS[name].metrics for value in metric.describe()
    }
    assert len(list((tmp_path / name / "samples").glob("*.mp4"))) == 4
    assert "not as prompted" in (tmp_path / name / "report.html").read_text()


def test_the_help_lists_all_protocols(script):
    done = script("experiments/evaluate.py", "--help")
    assert done.code == 0
    words = done.out.replace("│", " ").replace(",", " ").replace(".", " ").split()
    assert {*PROTOCOLS, "quickstart"} <= set(words)
