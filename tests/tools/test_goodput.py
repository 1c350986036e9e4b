"""The command that prints where the time of a run went."""

import json

from support.attempts import write_attempt


def test_the_table_and_the_document(script, tmp_path):
    write_attempt(tmp_path, 1, 1000, 0, 60, save=2, slow_host="node2")
    write_attempt(tmp_path, 2, 1100, 40, 100, save=2, ending="finished")
    done = script("tools/goodput.py", tmp_path)
    assert done.code == 0, done.err
    assert "goodput 58.1 % of 3 min; 100 steps kept, 20 taken again; attempts: 2" in done.out
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "training steps that were kept 2 min 58.1 %" in lines
    assert "steps that were taken again 20 s 11.6 %" in lines
    assert "not running 28 s 16.3 %" in lines
    assert any(line.endswith("- 72 s 40 20 55.6 % killed") for line in lines)
    assert any(line.endswith("28 s 72 s 60 0 83.3 % finished") for line in lines)
    assert "Process 2 (node2) was slow in attempt 1, from step 60 on: 2.2 times the median between steps." in lines
    document = json.loads(script("tools/goodput.py", tmp_path, "--json").out)
    assert document["goodput"] == 100 / 172
    assert document["total_seconds"] == 172
    assert document["seconds"] == {"startup": 20, "step": 100, "lost": 20, "save": 4, "idle": 28}
    assert [each["lost_steps"] for each in document["attempts"]] == [20, 0]
    assert document["attempts"][0]["slow_hosts"][0]["host"] == "node2"


def test_a_run_without_records_is_an_error(script, tmp_path):
    done = script("tools/goodput.py", tmp_path)
    assert done.code == 2
    assert f"RUN={tmp_path} is invalid" in done.err
    assert "Use the folder of another run" in done.err
