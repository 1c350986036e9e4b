"""The age of a process is that of the operating system, also after it has started itself again."""

import subprocess
import sys
import time

from dit_video.core.platform import process_time

PROGRAM = """
import os, sys, time
if len(sys.argv) == 1:
    time.sleep(0.7)
    os.execv(sys.executable, [sys.executable, __file__, "again"])
from dit_video.core.platform.process_time import get_process_age
print(get_process_age())
"""


def test_the_age_is_that_of_the_process_and_not_of_the_import(tmp_path, monkeypatch):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    start_time = time.monotonic()
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert 0.65 < float(done.stdout) <= time.monotonic() - start_time + 0.02  # ticks of 10 ms


def test_ps_knows_the_same_in_seconds(monkeypatch):
    age = process_time.get_process_age()
    monkeypatch.setattr(process_time.Path, "exists", lambda _: False)
    assert abs(process_time.get_process_age() - age) < 2


def test_without_an_answer_it_is_the_time_since_the_import(monkeypatch):
    def fail(*_arguments, **_options):
        raise OSError

    monkeypatch.setattr(process_time.Path, "read_text", fail)
    monkeypatch.setattr(process_time.subprocess, "run", fail)
    first = process_time.get_process_age()
    time.sleep(0.01)
    assert 0.01 <= process_time.get_process_age() - first < 60
