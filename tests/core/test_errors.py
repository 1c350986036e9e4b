"""Ends of scripts after errors and Ctrl-C."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dit_video.core.errors import (
    DecodeError,
    GracefulStop,
    MissingError,
    TransientError,
    UserError,
    raise_if_interrupted,
    script,
)
from dit_video.training.hooks.logging import Progress


@pytest.fixture
def interruptible():
    """Handle Ctrl-C as in a terminal; processes in the background of a shell, such as these tests, may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (MissingError, 2), (DecodeError, 2), (TransientError, 75)])
def test_an_error_of_a_user_is_one_line_and_an_exit_code(capsys, kind, code):
    @script
    def main():
        raise kind("T=16 is not 1 + 4k for temporal stride 4; use 13 or 17")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: T=16 is not 1 + 4k for temporal stride 4; use 13 or 17\n"
    assert not issubclass(kind, ValueError)  # which argument parsers catch, and print in a frame


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_whoever_writes(capsys, number):
    @script
    def main():
        raise OSError(number, os.strerror(number), "run/hash_chain.jsonl")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2  # which launchers do not start again
    line = f"error: run/hash_chain.jsonl cannot be written: {os.strerror(number)}. Free disk space, then run"
    assert capsys.readouterr().err.startswith(line)


def test_the_error_is_the_last_line_after_those_of_objects_that_end_with_it(capsys):
    """Futures of asyncio report an error that nobody asked for when they are freed."""

    class Library:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            print("ERROR:asyncio:Future exception was never retrieved", file=sys.stderr)

    @script
    def main():
        library = Library()
        raise UserError(f"{type(library).__name__} cannot write")

    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.splitlines() == [
        "ERROR:asyncio:Future exception was never retrieved",
        "error: Library cannot write",
    ]


_USE = """import jax.numpy as jnp
from dit_video.core.errors import script
@script
def main():
    jnp.ones(3) + 1
main()"""


@pytest.mark.parametrize("platform", ["cuda", "cud"])
@pytest.mark.parametrize(
    "command",
    [("-c", _USE), ("experiments/quickstart.py",), ("-m", "dit_video.web", "experiments/pretrained/shapes")],
)
def test_a_platform_without_devices_is_one_line(platform, command):
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    command = [sys.executable, *command]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: JAX_PLATFORMS={platform} is invalid: there is no such device")
    assert "Traceback" not in done.stderr


def test_a_warning_is_one_line_without_our_source():
    code = (
        "import warnings\nfrom dit_video.core.errors import script\n@script\ndef main():\n"
        "    warnings.warn('the model was not trained for this')\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "warning: the model was not trained for this\n")


def test_other_errors_keep_their_traceback():
    @script
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_script_passes_arguments_and_keeps_the_name():
    seen = []

    @script
    def train(run, *, seed):
        """Train a model."""
        seen.append((run, seed))

    train("runs/x", seed=3)
    assert seen == [("runs/x", 3)]
    assert (train.__name__, train.__doc__) == ("train", "Train a model.")


def test_a_closed_pipe_ends_quietly():
    code = "from dit_video.core.errors import script\n@script\ndef main():\n    raise BrokenPipeError\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("code", [0, 75])
def test_a_run_that_was_stopped_ends_with_the_code_that_was_asked_for(capsys, monkeypatch, code):
    monkeypatch.setattr(GracefulStop, "code", code)
    monkeypatch.setattr(sys, "argv", ["experiments/train.py", "my config.py", "--data", "clips"])

    @script
    def main():
        raise GracefulStop("training, by SIGTERM after step 7, which is saved")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    message = "stopped: training, by SIGTERM after step 7, which is saved; the same command continues from there: "
    command = "python experiments/train.py 'my config.py' --data clips"
    assert capsys.readouterr().err.strip() == message + command


@pytest.mark.parametrize("path", ["experiments/quickstart.py", "tools/ingest.py", "tools/encode_latents.py"])
def test_ctrl_c_ends_with_one_line_and_the_command_that_continues(capsys, monkeypatch, path):
    monkeypatch.setattr(sys, "argv", [path, "a", "--b", "c d"])

    @script
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    message = f"interrupted: the same command continues with the remaining work: python {path} a --b 'c d'"
    assert capsys.readouterr().err.strip() == message


def test_ctrl_c_in_a_script_that_keeps_nothing_does_not_promise_to_continue(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/sample.py", "run"])

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        script(main, is_resumable=False)()
    message = "interrupted: the same command starts again: python experiments/sample.py run"
    assert capsys.readouterr().err.strip() == message


@pytest.mark.usefixtures("interruptible")
def test_a_ctrl_c_that_falls_into_a_finalizer_still_stops_the_script(capsys):
    class Finalized:
        def __del__(self):
            raise KeyboardInterrupt

    waited = []

    @script
    def main():
        Finalized()
        for _ in range(500):
            time.sleep(0.01)
        waited.append("to the end")

    before = sys.unraisablehook
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert not waited
    assert sys.unraisablehook is before
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: the same command continues")


@pytest.mark.usefixtures("interruptible")
def test_a_ctrl_c_that_is_dropped_stops_the_script_at_its_next_progress(capsys):
    reached = []

    @script
    def main():
        with contextlib.suppress(KeyboardInterrupt):  # stands for compiled code that drops it
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        reached.append("dropped")
        with Progress("work", 10, stream=io.StringIO()) as progress:
            for step in range(10):
                progress.update(step + 1)
                reached.append(step)

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert reached == ["dropped"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    raise_if_interrupted()  # nothing is left of it
    capsys.readouterr()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_errors_in_finalizers_do_not_stop_the_script(capsys):
    class Finalized:
        def __del__(self):
            raise ZeroDivisionError

    reached = []

    @script
    def main():
        Finalized()
        time.sleep(0.1)
        reached.append("the end")

    main()
    assert reached


def test_a_stop_in_a_notebook_is_one_line(capsys):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.user_ns["error"] = GracefulStop("denoiser, by SIGINT after step 7, which is saved")
    shell.run_cell("raise error")
    printed = capsys.readouterr()
    message = "stopped: denoiser, by SIGINT after step 7, which is saved; run the cell again to continue"
    assert printed.out.strip() == message
    assert printed.err == ""
