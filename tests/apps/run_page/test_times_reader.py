"""The page of a run shows where the time of all its attempts went, while another process records more."""

import time

from dit_video.apps.run_page.run_state import RunReader, make_document
from dit_video.apps.run_page.run_view import make_view
from dit_video.apps.run_page.times_reader import TimesReader
from dit_video.training.goodput import RunTimes, read_run_times
from dit_video.training.time_recorder import TimeRecorder
from support.attempts import write_attempt
from support.run_folders import write_config, write_entries


def test_a_reading_sees_what_was_written_since(tmp_path):
    reader = TimesReader(tmp_path)
    assert reader.read() == RunTimes()
    for number in range(1, 4):
        write_attempt(tmp_path, number, 1000 * number, 10 * number, 10 * number + 20)
        assert reader.read() == read_run_times(tmp_path)
    write_attempt(tmp_path, 3, 3000, 30, 500)  # it went on
    assert reader.read() == read_run_times(tmp_path)
    assert reader.read().kept_steps == 490
    (tmp_path / "goodput" / "0002.jsonl").unlink()
    assert len(reader.read().attempts) == 2


def test_unchanged_files_are_not_parsed_again(tmp_path, monkeypatch):
    from dit_video.apps.run_page import times_reader

    parsed = []
    real = times_reader.parse_attempt
    monkeypatch.setattr(times_reader, "parse_attempt", lambda text: parsed.append(text) or real(text))
    reader = TimesReader(tmp_path)
    for number in range(1, 6):
        write_attempt(tmp_path, number, 1000 * number, 0, 20)
    reader.read()
    write_attempt(tmp_path, 5, 5000, 0, 21)
    reader.read()
    reader.read()
    assert len(parsed) == 6


def test_the_view_and_the_document_have_the_goodput(tmp_path):
    write_config(tmp_path)
    write_entries(tmp_path, 10, 20)
    view = make_view(RunReader(tmp_path).read())
    assert (view.times, view.goodput) == (None, "")
    write_attempt(tmp_path, 1, 1000, 0, 60)
    write_attempt(tmp_path, 2, 1100, 40, 100)
    state = RunReader(tmp_path).read()
    view = make_view(state)
    assert view.goodput == "58.8 % goodput"
    assert view.times is not None
    assert "steps that were taken again" in view.times
    document = make_document(state)
    assert document["goodput"] == 100 / 170
    assert document["attempts"] == 2
    assert document["lost_steps"] == 20
    assert document["seconds"] == {"startup": 20, "step": 100, "lost": 20, "idle": 30}


def test_a_run_that_is_recorded_at_this_moment_is_read(tmp_path):
    write_config(tmp_path)
    reader, recorder = TimesReader(tmp_path), TimeRecorder(tmp_path / "goodput")
    with recorder.attempt():
        recorder.resume("denoiser", 0)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            recorder.cut(5)
            reader.read()
        recorder.end_training(5)
    assert reader.read() == read_run_times(tmp_path)
    assert reader.read().kept_steps == 5
