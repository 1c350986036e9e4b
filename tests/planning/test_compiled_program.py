"""Messages of a compiler about programs that do not fit."""

import pytest

from dit_video.planning.compiled_program import parse_oom_message


@pytest.mark.parametrize(
    ("message", "sentence", "gibibytes"),
    [
        # libtpu, where what is temporary is too much alone: what the program is given comes on top.
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (508.5G) "
            "exceeds available HBM (15.75G).",
            "Ran out of memory on HBM",
            508.5 + 3,
        ),
        # libtpu, of a whole program
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 29.5G of 15.75G hbm. Exceeded hbm capacity by 13.75G.\n\nTotal hbm usage >= 30G:\n  reserved 258.00M",
            "XLA:TPU compile permanent error",
            29.5,
        ),
        # XLA for GPUs
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 96.25GiB.\n[more]",
            "Out of memory while trying",
            96.25,
        ),
        ("RESOURCE_EXHAUSTED: Too much.", "Too much.", 0),
    ],
)
def test_the_message_of_a_program_that_does_not_fit_is_parsed(message, sentence, gibibytes):
    said, peak = parse_oom_message(message, argument_bytes=3 * 2**30)
    assert said.startswith(sentence)
    assert "\n" not in said
    assert peak == gibibytes * 2**30
