"""Logs, records of times and grids are read while another process writes them, also after one was cut."""

import json
import math
import time

import pytest

from dit_video.apps.run_page.routes import make_view
from dit_video.apps.run_page.run_files import MetricsReader, TimesReader, TimeUseCounter, list_grids
from dit_video.apps.run_page.run_state import RunReader, make_document
from dit_video.training import loop
from dit_video.training.goodput import RunTimes, read_run_times
from dit_video.training.hooks.hook import PeriodicCall
from dit_video.training.hooks.logging import MetricsLog
from dit_video.training.loop import LoopConfig
from dit_video.training.time_recorder import TimeRecorder
from support.attempts import write_attempt
from support.loop_training import init_state, make_batches, train
from support.loop_training import step as training_step
from support.run_folders import write_config, write_entries, write_grid


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def get_steps(reader):
    return [entry["step"] for entry in reader.read()]


def test_appended_entries_are_read_once_they_are_complete(path):
    reader, log = MetricsReader(path), MetricsLog(path)
    assert reader.read() == []
    log.write(10, {"loss": 0.5})
    assert reader.read() == [{"step": 10, "loss": 0.5}]
    line = b'{"step": 20, "loss": 0.25}\n'
    for end in range(len(line)):
        with path.open("ab") as file:
            file.write(line[end : end + 1])
        assert get_steps(reader) == ([10] if end < len(line) - 1 else [10, 20])
    log.write(30, {"loss": 1.0})
    assert get_steps(reader) == get_steps(MetricsReader(path)) == [10, 20, 30]


def test_a_log_that_was_cut_and_continued_is_read_again(path):
    reader, log = MetricsReader(path), MetricsLog(path)
    for step in (10, 20, 30):
        log.write(step, {"loss": float(step)})
    assert get_steps(reader) == [10, 20, 30]
    log.resume(15)
    for step in (16, 17, 18, 19):
        log.write(step, {"loss": -1.0})
    assert [(entry["step"], entry["loss"]) for entry in reader.read()] == [(10, 10)] + [(s, -1) for s in range(16, 20)]
    path.unlink()
    assert reader.read() == []


def test_lines_that_are_no_entries_are_skipped(path):
    lines = [
        *('{"step": 1, "loss": null}', "nonsense", '{"loss": 2}', "[1]", "3", "null", '{"step": 1e999}', "\udcff"),
        *('{"step": "x"}', "", '{"step": 5, "loss": 1, "flag": true, "text": "<script>", "list": [1], "NaN": NaN}'),
        "[" * 100_000,
    ]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape") + b"\n")
    first, last = MetricsReader(path).read()
    assert first["step"] == 1
    assert math.isnan(first["loss"])
    assert math.isnan(last.pop("NaN"))
    assert last == {"step": 5, "loss": 1}


def test_a_folder_in_the_place_of_the_log_is_no_log(path):
    path.mkdir()
    assert MetricsReader(path).read() == []


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
    from dit_video.apps.run_page import run_files

    parsed = []
    real = run_files.parse_attempt
    monkeypatch.setattr(run_files, "parse_attempt", lambda text: parsed.append(text) or real(text))
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


def compute_time_use(entries):
    return TimeUseCounter().update(entries)


FIRST = {
    "step": 10.0,
    "first_step_seconds": 50.0,
    "first_batch_seconds": 8.0,
    "compile_seconds": 40.0,
    "step_seconds": 1.0,
    "data_wait": 0.25,
    "interval_seconds": 62.0,
    "validate_seconds": 3.0,
    "unix_seconds": 1000.0,
}
NEXT = {
    "step": 20.0,
    "step_seconds": 2.0,
    "data_wait": 0.5,
    "interval_seconds": 30.0,
    "save_seconds": 6.0,
    "validate_seconds": 3.0,
    "hook_seconds": 1.0,
    "unix_seconds": 1030.0,
}


def test_the_parts_of_an_interval_add_up_to_it():
    use = compute_time_use([FIRST])
    assert (use.compilation, use.checkpoints, use.hooks, use.restarts) == (40, 0, {"validate": 3}, 0)
    assert use.data == 8 + 0.25 * 9
    assert use.steps == 62 - 40 - 3 - use.data
    assert use.total == 62
    use = compute_time_use([FIRST, NEXT])
    assert use.hooks == {"validate": 6, "hook": 1}
    assert use.checkpoints == 6
    assert use.data == 8 + 0.25 * 9 + 0.5 * 20
    assert use.total == 62 + 30
    assert use.lost_share == pytest.approx(1 - use.steps / 92)
    assert use.is_complete


def test_time_between_processes_is_that_of_restarts():
    again = {**FIRST, "step": 30.0, "unix_seconds": 1030.0 + 200 + 62}
    use = compute_time_use([FIRST, NEXT, again])
    assert use.restarts == 200
    assert use.total == 62 + 30 + 62 + 200


def test_entries_are_added_as_they_come_and_anew_after_a_log_was_cut():
    again = {**FIRST, "step": 30.0, "unix_seconds": 1030.0 + 200 + 62}
    counter = TimeUseCounter()
    for entries in ([], [FIRST], [FIRST], [FIRST, NEXT], [FIRST, NEXT, again], [FIRST, again], [dict(FIRST), NEXT], []):
        assert counter.update(entries) == compute_time_use(entries)
    before = counter.update([FIRST])
    counter.update([FIRST, NEXT])
    assert before == compute_time_use([FIRST])  # a result stays as it is


def test_a_log_of_an_older_version_has_steps_and_waits_alone():
    entries = [{"step": float(step), "step_seconds": 2.0, "data_wait": 0.25, "loss": 1.0} for step in (10, 20)]
    use = compute_time_use(entries)
    assert (use.steps, use.data, use.total) == (30, 10, 40)
    assert not use.is_complete
    assert compute_time_use([]).lost_share is None


def test_invalid_times_count_as_none():
    bad = {**NEXT, "save_seconds": math.nan, "compile_seconds": -5.0, "data_wait": 7.0, "unix_seconds": math.nan}
    use = compute_time_use([FIRST, bad])
    assert (use.checkpoints, use.compilation, use.restarts) == (0, 40, 0)
    assert min(use.steps, use.data, use.total) >= 0


def test_the_log_of_a_training_gives_where_its_time_went(tmp_path):
    def batches(done):
        for batch in make_batches(done):
            time.sleep(0.01)
            yield batch

    def validate(_done, _state):
        time.sleep(0.2)
        return {}

    start = time.time()
    hooks = [MetricsLog(tmp_path / "m.jsonl"), PeriodicCall(every=10, function=validate, name="validate")]
    loop.run(training_step, init_state(), batches, config=LoopConfig(steps=30, log_every=5), hooks=hooks)
    seconds = time.time() - start
    use = compute_time_use(MetricsReader(tmp_path / "m.jsonl").read())
    assert use.hooks["validate"] == pytest.approx(0.6, rel=0.3)
    assert 0.1 < use.data < 0.3 + 0.5 * seconds
    assert use.compilation > 0
    assert 0.5 * seconds < use.total < seconds
    train(tmp_path / "other", LoopConfig(steps=4, log_every=2, save_every=1))
    assert compute_time_use(MetricsReader(tmp_path / "other" / "metrics.jsonl").read()).checkpoints > 0


def test_grids_are_listed_by_step_with_their_tiles(tmp_path):
    for step in (200, 1000, 30):
        write_grid(tmp_path, step, texts=("a duck", "a fox", "<b>"))
    write_grid(tmp_path, 5, name="autoencoder", kind="reconstructions")
    (series,) = list_grids(tmp_path, "denoiser")
    assert [file.step for file in series.files] == [30, 200, 1000]
    assert (series.kind, series.size, series.tile_size) == ("samples", (16, 76), (16, 24))
    assert [tile.text for tile in series.tiles] == ["a duck", "a fox", "<b>"]
    assert series.tiles[2].left == 52
    url = series.get_url(series.files[0])
    assert url.startswith("run/media/denoiser/samples/00000030.mp4?v=")
    write_grid(tmp_path, 30, texts=("a duck", "a fox", "<b>"))
    assert list_grids(tmp_path, "denoiser")[0].get_url(series.files[0]) == url
    assert list_grids(tmp_path, "denoiser")[0].files[0].version >= series.files[0].version
    (series,) = list_grids(tmp_path, "autoencoder")
    assert series.kind == "reconstructions"


def test_other_files_are_not_listed(tmp_path):
    write_grid(tmp_path, 10)
    folder = tmp_path / "denoiser" / "samples"
    for name in (".00000020.ab12.partial.mp4", "20.html", "x.mp4", "20.mp4.exe", "-1.mp4", "notes.txt"):
        (folder / name).write_text("x")
    (folder / "30.mp4").mkdir()
    (series,) = list_grids(tmp_path, "denoiser")
    assert [file.path.name for file in series.files] == ["00000010.mp4"]
    assert list_grids(tmp_path, "autoencoder") == ()


def test_links_that_lead_out_of_the_run_are_not_listed(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "secret.mp4"
    outside.write_text("secret")
    write_grid(run, 10)
    folder = run / "denoiser" / "samples"
    (folder / "20.mp4").symlink_to(outside)
    (folder / "30.mp4").symlink_to(folder / "00000010.mp4")
    (folder / "40.mp4").symlink_to(run / "nowhere.mp4")
    (series,) = list_grids(run, "denoiser")
    assert [file.step for file in series.files] == [10, 30]
    write_grid(tmp_path / "other", 50, kind="x")
    (run / "autoencoder").mkdir()
    (run / "autoencoder" / "samples").symlink_to(tmp_path / "other" / "denoiser" / "x")
    assert list_grids(run, "autoencoder") == ()


@pytest.mark.parametrize(
    "document",
    [
        "{",
        "[]",
        "null",
        json.dumps({"height": 0, "width": 8, "tile_height": 8, "tile_width": 8, "tiles": []}),
        json.dumps({"height": 8, "width": 8, "tile_height": 8, "tile_width": 8, "tiles": [{"text": "x", "left": -1}]}),
        json.dumps({"height": 8, "width": 8, "tile_height": 8, "tile_width": "x", "tiles": []}),
        json.dumps({"height": 1e999, "width": 8, "tile_height": 8, "tile_width": 8, "tiles": []}),
    ],
)
def test_grids_without_valid_tiles_are_listed_without(tmp_path, document):
    path = write_grid(tmp_path, 10)
    path.with_name("tiles.json").write_text(document)
    (series,) = list_grids(tmp_path, "denoiser")
    assert (series.size, series.tiles) == (None, ())
