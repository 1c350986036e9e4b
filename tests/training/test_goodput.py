"""Every microsecond of a run has one category, and lost steps follow from where later attempts resumed."""

import json
import random

import pytest

from dit_video.training import goodput
from dit_video.training.goodput import (
    DATA,
    IDLE,
    LOST,
    STARTUP,
    STEP,
    Attempt,
    SlowHost,
    TimeRecord,
    compute_metrics,
    describe_attempt,
    describe_record,
    parse_attempt,
    read_attempts,
    read_run_times,
    summarize,
)


def startup(seconds=10):
    return TimeRecord(microseconds={STARTUP: seconds * 10**6})


def steps(first, last, *, pace=1.0, data=0.0, training="denoiser"):
    """Return a record of steps after `first` up to `last`, of `pace` seconds each, with seconds of waiting for data."""
    times = {STEP: round((last - first) * pace * 1e6)} | ({DATA: round(data * 1e6)} if data else {})
    return TimeRecord(microseconds=times, training=training, start_step=first, step=last)


def attempt(number, begin, *records, **values):
    return Attempt(number=number, begin=round(begin * 1e6), records=records, **values)


def test_an_attempt_without_interruption_keeps_all_steps():
    times = summarize([attempt(1, 1000, startup(), steps(0, 40), steps(40, 60, data=5))])
    assert times.microseconds == {STARTUP: 10e6, STEP: 60e6, DATA: 5e6}
    assert (times.total, times.goodput, times.kept_steps, times.lost_steps) == (75e6, 60 / 75, 60, 0)


def test_steps_behind_the_one_that_the_next_attempt_resumed_from_are_lost():
    killed = attempt(1, 1000, startup(), steps(0, 50), steps(50, 70, data=3))
    resumed = attempt(2, 1200, startup(), steps(50, 90))
    times = summarize([killed, resumed])
    assert times.microseconds == {STARTUP: 20e6, STEP: 90e6, LOST: 20e6, DATA: 3e6, IDLE: (200 - 83) * 1e6}
    assert (times.kept_steps, times.lost_steps) == (90, 20)
    first, second = times.attempts
    assert (first.kept_steps, first.lost_steps, first.length) == (50, 20, 83e6)
    assert (second.kept_steps, second.lost_steps, second.length) == (40, 0, 50e6)
    assert first.microseconds[LOST] == 20e6
    assert second.microseconds[IDLE] == 117e6


def test_a_resume_from_the_middle_of_a_record_loses_its_share():
    times = summarize([attempt(1, 0, steps(0, 40)), attempt(2, 100, steps(30, 60))])
    assert times.microseconds == {STEP: 60e6, LOST: 10e6, IDLE: 60e6}


def test_an_older_checkpoint_loses_steps_of_several_attempts():
    """The second attempt saved nothing, and the third one fell back to the checkpoint of step 20."""
    times = summarize(
        [
            attempt(1, 0, steps(0, 20), steps(20, 40)),
            attempt(2, 40, steps(40, 45)),
            attempt(3, 45, steps(20, 60)),
        ]
    )
    assert times.microseconds == {STEP: 60e6, LOST: 25e6, IDLE: 0}
    assert [each.lost_steps for each in times.attempts] == [20, 5, 0]


def test_a_step_that_was_being_taken_is_lost_only_if_it_is_taken_again():
    unfinished = TimeRecord(microseconds={STEP: 700_000}, training="denoiser", start_step=20, step=20)
    killed = attempt(1, 0, steps(0, 20), unfinished)
    assert summarize([killed]).microseconds == {STEP: 20_700_000}
    times = summarize([killed, attempt(2, 100, steps(20, 30))])
    assert (times.microseconds[STEP], times.microseconds[LOST], times.lost_steps) == (30_000_000, 700_000, 0)


def test_trainings_lose_their_own_steps():
    """The denoiser begins at step 0, which takes nothing from the autoencoder."""
    whole = attempt(
        1, 0, startup(), steps(0, 8, training="autoencoder"), startup(2), steps(0, 10), startup(1), steps(10, 20)
    )
    times = summarize([whole, attempt(2, 100, startup(), steps(16, 20))])
    assert times.microseconds == {STARTUP: 23e6, STEP: 28e6, LOST: 4e6, IDLE: 59e6}
    assert (times.kept_steps, times.lost_steps) == (28, 4)


def test_a_clock_that_was_set_back_makes_no_negative_time():
    times = summarize([attempt(1, 5000, steps(0, 40)), attempt(2, 4000, steps(40, 60))])
    assert times.microseconds == {STEP: 60e6, IDLE: 0}
    assert times.goodput == 1


def test_the_parts_of_random_runs_add_up_to_their_time():
    numbers = random.Random(0)
    for _ in range(200):
        attempts, now, checkpoint = list[Attempt](), 0, 0
        for number in range(1, numbers.randint(2, 7)):
            now += numbers.randint(0, 10**8)
            records, done = [TimeRecord(microseconds={STARTUP: numbers.randint(0, 10**7)})], checkpoint
            for _ in range(numbers.randint(0, 6)):
                count = numbers.randint(0, 9)
                times = {STEP: count * numbers.randint(1, 10**6), "save": numbers.randint(0, 10**6)}
                records.append(TimeRecord(microseconds=times, training="d", start_step=done, step=done + count))
                done += count
                if numbers.random() < 0.3:
                    checkpoint = done
            attempts.append(Attempt(number=number, begin=now, records=tuple(records)))
            now = attempts[-1].end
        result = summarize(attempts)
        assert result.total == attempts[-1].end - attempts[0].begin
        assert min(result.microseconds.values()) >= 0
        last = max((record.step for record in attempts[-1].records if record.training), default=None)
        if last is not None:
            assert result.kept_steps == last
        shares = compute_metrics(result.microseconds)
        assert sum(value for name, value in shares.items() if name != "run_seconds") == pytest.approx(1)


def test_metrics_are_shares_by_group():
    times = {STEP: 60, DATA: 5, LOST: 4, IDLE: 6, "hook/validate": 3, "stage/latents": 7, "save": 10, "restore": 5}
    assert compute_metrics(times) == {
        "goodput": 0.6,
        "badput_data": 0.05,
        "badput_compile": 0.0,
        "badput_checkpoints": 0.15,
        "badput_monitoring": 0.03,
        "badput_stages": 0.07,
        "badput_startup": 0.0,
        "badput_restarts": 0.1,
        "run_seconds": 1e-4,
    }
    assert compute_metrics({}) == {}


# Files


def write(folder, attempt):
    lines = [describe_attempt(attempt), *map(describe_record, attempt.records)]
    lines += [{"slow_host": vars(each)} for each in attempt.slow_hosts]
    lines += [{"ending": attempt.ending}] if attempt.ending else []
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{attempt.number:04}.jsonl").write_text(text)
    return text


def test_attempts_are_read_as_they_were_written(tmp_path):
    slow = SlowHost(process=3, host="node3", cause="device 1", ratio=1.9, step=40)
    values = {"host": "node0", "process_count": 4, "slow_hosts": (slow,)}
    attempts = tuple(
        attempt(number, 100 * number, startup(), steps(number, number + 5), ending="stopped", **values)
        for number in range(1, 12)
    )
    for each in reversed(attempts):
        write(tmp_path / "goodput", each)
    (tmp_path / "goodput" / "notes.txt").write_text("mine")
    assert read_attempts(tmp_path / "goodput") == attempts
    assert read_run_times(tmp_path) == summarize(attempts)
    assert read_run_times(tmp_path / "other").attempts == ()


def test_a_file_that_is_cut_anywhere_gives_the_records_before(tmp_path):
    whole = attempt(1, 7, startup(), steps(0, 5), steps(5, 9), host="ä", ending="finished")
    text = write(tmp_path, whole)
    header = text.index("\n")
    for length in range(len(text)):
        parsed = parse_attempt(text[:length])
        if length < header:
            assert parsed is None
        else:
            assert parsed is not None
            assert parsed.begin == whole.begin
            assert parsed.records == whole.records[: len(parsed.records)]


@pytest.mark.parametrize("line", ["null", "[1]", '{"microseconds": 5}', '{"microseconds": {"step": "x"}}', "{", "\x00"])
def test_lines_that_are_no_records_are_left_out(tmp_path, line):
    whole = attempt(1, 7, startup(), steps(0, 5))
    header, first, *rest = write(tmp_path, whole).splitlines(keepends=True)
    assert parse_attempt("".join([header, first, f"{line}\n", *rest])) == whole
    assert parse_attempt(f"{line}\n{first}") is None


def test_an_open_record_counts_until_the_next_one(tmp_path):
    header, *_ = write(tmp_path, attempt(1, 7)).splitlines()
    open_line = json.dumps({**describe_record(startup(3)), "is_open": True})
    line = json.dumps(describe_record(startup(5)))
    assert parse_attempt(f"{header}\n{open_line}").records == (startup(3),)
    assert parse_attempt(f"{header}\n{open_line}\n{open_line}").records == (startup(3),)
    assert parse_attempt(f"{header}\n{open_line}\n{line}\n{line}").records == (startup(5), startup(5))


def test_records_lie_at_addresses_too():
    import fsspec

    fsspec.filesystem("memory").pipe_file("/goodput-run/goodput/0001.jsonl", b'{"attempt": 1, "begin": 5}\n')
    assert [each.begin for each in read_attempts("memory://goodput-run/goodput")] == [5]
    assert read_run_times("memory://nothing-here").attempts == ()


def test_categories_of_hooks_and_stages_have_their_groups():
    assert {goodput.get_group(name) for name in ("hook/validate", "hook/save")} == {"monitoring"}
    assert {goodput.get_group(name) for name in ("stage/latents", "evaluation", "report")} == {"stages"}
    assert describe_record(startup()) == {"microseconds": {"startup": 10**7}}
