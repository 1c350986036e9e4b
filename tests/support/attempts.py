"""Records of the attempts of a run, as its first process writes them."""

import json
from pathlib import Path

from dit_video.training.goodput import (
    GOODPUT_FOLDER,
    Attempt,
    SlowHost,
    TimeRecord,
    describe_attempt,
    describe_record,
)


def write_attempt(
    run: Path,
    number: int,
    begin: int,
    first: int,
    last: int,
    *,
    ending: str = "",
    training: str = "denoiser",
    slow_host: str = "",
    **seconds: int,
) -> Attempt:
    """Write an attempt that starts for 10 s and takes a second for each step after `first` up to `last`.

    Args:
      run: Folder of the run.
      number: Number of the attempt.
      begin: Time of day of its start in seconds.
      first: Number of steps before it.
      last: Number of steps at its end.
      ending: How it ended.
      training: Name of the training.
      slow_host: Name of a host that was slow; empty for none.
      seconds: Further times by category, in which `__` stands for `/`.
    """
    times = {"step": (last - first) * 1_000_000}
    times |= {name.replace("__", "/"): value * 1_000_000 for name, value in seconds.items()}
    slow = SlowHost(process=2, host=slow_host, cause="data", ratio=2.25, step=last)
    attempt = Attempt(
        number=number,
        begin=begin * 1_000_000,
        host="node0",
        process_count=4,
        records=(
            TimeRecord(microseconds={"startup": 10_000_000}),
            TimeRecord(microseconds=times, training=training, start_step=first, step=last),
        ),
        ending=ending,
        slow_hosts=(slow,) if slow_host else (),
    )
    lines = [describe_attempt(attempt), *map(describe_record, attempt.records)]
    lines += [{"slow_host": vars(each)} for each in attempt.slow_hosts]
    lines += [{"ending": ending}] if ending else []
    path = run / GOODPUT_FOLDER / f"{number:04}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return attempt
