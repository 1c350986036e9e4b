"""Records of the attempts of a run, as its first process writes them."""

from pathlib import Path

from dit_video.training.goodput import (
    GOODPUT_FOLDER,
    Attempt,
    SlowHost,
    TimeRecord,
    format_ending,
    format_header,
    format_record,
    format_slow_host,
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
    lines = [format_header(attempt), *map(format_record, attempt.records), *map(format_slow_host, attempt.slow_hosts)]
    path = run / GOODPUT_FOLDER / f"{number:04}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join([*lines, format_ending(ending) if ending else ""]))
    return attempt
