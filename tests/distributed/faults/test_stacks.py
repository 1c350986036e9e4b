import subprocess
import sys

import pytest

from support.devices import HANG, make_environment

IMPORT = "from dit_video.distributed.faults.stacks import exit_now"
CLOSE = "import sys; sys.stdout.close(); print('still here', end='', file=sys.stderr)"
BLOCK = """
import io, sys, time
class DeadDisk(io.StringIO):
    def flush(self): time.sleep(600)
sys.stdout = DeadDisk()
"""


def run_python(program):
    """Run a program whose output is a pipe, and so not written at once; return its code and outputs."""
    command, environment = [sys.executable, "-c", f"{IMPORT}\n{program}\nexit_now(75)"], make_environment(1)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANG)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.nightly
def test_what_was_printed_before_an_immediate_exit_is_written():
    program = "import sys; print('a line'); print('an error', end='', file=sys.stderr)"
    assert run_python(program) == (75, "a line\n", "an error")
    assert run_python(CLOSE) == (75, "", "still here")


@pytest.mark.slow
def test_an_output_that_hangs_does_not_keep_the_process():
    assert run_python(BLOCK) == (75, "", "")
