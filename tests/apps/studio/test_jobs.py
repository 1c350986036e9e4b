"""The queue: its order, limits, cancelled jobs and what pages see of it."""

import threading

import pytest

from dit_video.apps.studio import jobs
from dit_video.apps.studio.jobs import MAX_JOBS, Job, JobQueue, QueueFullError, StepTimer
from dit_video.core.errors import MissingError


def submit(queue, *names):
    """Submit jobs of users, named such as `a1`; return them by name."""
    named = {name: Job(user=name[0], tab="loop", title=name, content=None) for name in names}
    for job in named.values():
        queue.submit(job)
    return named


def take_all(queue, count):
    return [queue.take().title for _ in range(count)]


def test_users_are_served_in_turn_each_in_the_order_of_their_jobs():
    queue = JobQueue()
    submit(queue, "a1", "a2", "a3", "b1", "c1", "b2")
    assert take_all(queue, 6) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_user_who_was_served_long_ago_comes_before_one_who_was_just_served():
    queue = JobQueue()
    submit(queue, "a1", "b1")
    assert take_all(queue, 2) == ["a1", "b1"]
    submit(queue, "b2", "a2", "c1")
    assert take_all(queue, 3) == ["c1", "a2", "b2"]


def test_jobs_of_users_who_left_come_last_and_are_kept(monkeypatch):
    monkeypatch.setattr(jobs, "ABSENT_SECONDS", 0.0)
    queue = JobQueue()
    queue.open_page("a")
    queue.open_page("b")
    submit(queue, "a1", "a2", "b1", "b2")
    queue.close_page("a")
    assert take_all(queue, 3) == ["b1", "b2", "a1"]
    queue.open_page("a")
    assert queue.describe("a")[1]["jobs"][1]["ahead"] == 1  # the one that runs


def test_a_page_in_the_background_which_asks_for_the_state_keeps_its_place():
    queue = JobQueue()
    queue.open_page("a")
    queue.close_page("a")  # in the background
    queue.open_page("b")
    submit(queue, "a1", "b1")
    queue.note_contact("a")
    assert take_all(queue, 2) == ["a1", "b1"]


def test_pages_see_the_number_of_jobs_before_each_of_their_own_alone():
    queue = JobQueue()
    submit(queue, "a1", "a2", "b1")
    queue.take()
    state = queue.describe("a")[1]
    assert [(job["title"], job["status"], job["ahead"]) for job in state["jobs"]] == [
        ("a1", "preparing", 0),
        ("a2", "waiting", 2),
    ]
    assert [job["title"] for job in queue.describe("b")[1]["jobs"]] == ["b1"]
    assert state["waiting"] == 2


def test_a_cancelled_job_is_never_taken_and_one_that_runs_is_told_to_end():
    queue = JobQueue()
    named = submit(queue, "a1", "a2", "b1")
    running = queue.take()
    queue.cancel("a", named["a2"].id)
    queue.cancel("a", running.id)
    assert named["a2"].status == "cancelled"
    assert running.is_cancelled
    assert running.status == "preparing"  # until its thread ends it
    assert queue.take().title == "b1"
    queue.update(running, status="cancelled")
    queue.cancel("a", running.id)  # takes it off the list
    assert [job["title"] for job in queue.describe("a")[1]["jobs"]] == ["a2"]


def test_jobs_of_other_users_cannot_be_seen_or_cancelled():
    queue = JobQueue()
    named = submit(queue, "a1")
    with pytest.raises(MissingError):
        queue.cancel("b", named["a1"].id)
    with pytest.raises(MissingError):
        queue.get("b", named["a1"].id)
    assert named["a1"].status == "waiting"


def test_a_user_has_a_limited_number_of_jobs_and_the_list_of_finished_ones_is_short(monkeypatch):
    queue = JobQueue()
    submit(queue, *(f"a{number}" for number in range(MAX_JOBS)))
    with pytest.raises(QueueFullError, match=str(MAX_JOBS)):
        submit(queue, "a9")
    submit(queue, "b1")  # others are not concerned
    monkeypatch.setattr(jobs, "MAX_FINISHED", 2)
    for _ in range(4):
        queue.update(queue.take(), status="done")
    submit(queue, "a9")
    statuses = [job["status"] for job in queue.describe("a")[1]["jobs"]]
    assert statuses.count("done") == 2


def test_every_change_of_the_state_has_a_new_version():
    queue = JobQueue()
    versions = [queue.get_version("a")]
    (job,) = submit(queue, "a1").values()
    versions.append(queue.get_version("a"))
    queue.update(queue.take(), step=4, steps=8)
    versions.append(queue.get_version("a"))
    gallery = queue.describe("a")[1]["gallery"]
    queue.update(job, status="done", items=("x",))
    versions.append(queue.get_version("a"))
    assert len(set(versions)) == 4
    assert queue.describe("a")[1]["gallery"] == gallery + 1


def test_a_closed_queue_ends_the_thread_that_waits():
    queue, taken = JobQueue(), []
    thread = threading.Thread(target=lambda: taken.append(queue.take()), daemon=True)
    thread.start()
    queue.close()
    thread.join(10)
    assert taken == [None]


def test_the_time_left_is_that_of_the_steps_after_the_first_report(monkeypatch):
    now = iter([100.0, 101.0, 103.0, 110.0])  # the first report came after compilation
    monkeypatch.setattr(jobs.time, "perf_counter", lambda: next(now))
    timer = StepTimer()
    assert [timer.estimate(step, 12) for step in (4, 6, 10)] == [None, 3.0, 1.0]
    assert timer.estimate(4, 12) is None  # a task that samples again
