"""evaluate.py by the protocols of physics, as a user starts it."""

import pytest

import dit_video.scenes.protocols  # noqa: F401, registers its protocols
from dit_video.evaluation.protocols import PROTOCOLS


@pytest.mark.parametrize("name", ["physics", "physics_extension"])
def test_a_model_that_reads_a_part_of_the_captions_is_not_judged_by_them(name, tmp_path, script):
    arguments = ("--out", tmp_path, "--protocol", name, "--count", 8, "--steps", 2)
    done = script("experiments/evaluate.py", "experiments/pretrained/shapes", *arguments)
    assert done.code == 2
    assert "max_tokens=64 is invalid: 8 of 8 captions of the scenes are longer than the model reads" in done.err
    assert not (tmp_path / name / "samples").exists()


def test_the_help_lists_all_protocols(script):
    done = script("experiments/evaluate.py", "--help")
    assert done.code == 0
    words = done.out.replace("│", " ").replace(",", " ").replace(".", " ").split()
    assert {*PROTOCOLS, "quickstart"} <= set(words)
