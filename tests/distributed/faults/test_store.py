"""Processes meet through a real coordination service of JAX, in which threads stand for them."""

import threading
import time

import jax
import pytest

from dit_video.distributed.faults.store import AbortedWaitError, KeyValueStore
from support.coordination import run_in_all, simulate_processes


def meet(group, **options):
    store = KeyValueStore("test", group)
    return store.meet("place", str(group.process_id), combine="-".join, **options)


def test_all_processes_get_what_the_first_makes_of_their_texts():
    with simulate_processes(12) as groups:
        assert run_in_all(meet, groups) == ["-".join(map(str, range(12)))] * 12
        assert KeyValueStore("test", groups[0]).read().keys() == {"place"}  # The texts of all are removed.
        assert meet(groups[3]) == "-".join(map(str, range(12)))  # A repeated call has the same result.


def test_a_text_is_replaced_and_a_missing_one_is_none():
    with simulate_processes(1) as groups:
        store = KeyValueStore("test", groups[0])
        assert store.try_read("name") is None
        store.write("name", "a")
        store.write("name", "b")
        assert store.try_read("name") == store.wait_for("name") == "b"
        assert KeyValueStore("other", groups[0]).read() == {}


def test_who_waits_too_long_learns_who_is_missing():
    with simulate_processes(3) as groups:
        KeyValueStore("test", groups[1]).join_meeting("place")
        with pytest.raises(TimeoutError, match=r"^2$"):
            meet(groups[0], seconds=0.2)
        with pytest.raises(TimeoutError, match="place"):
            meet(groups[1], seconds=0.2)


def test_a_wait_can_be_aborted():
    with simulate_processes(2) as groups:
        abort = threading.Event()
        threading.Timer(0.1, abort.set).start()
        for group in groups:
            with pytest.raises(AbortedWaitError):
                meet(group, abort=abort)


def test_calls_that_fail_a_few_times_are_repeated_and_then_raise():
    with simulate_processes(2) as groups:
        for group in groups:
            group.client.num_failures = 2
        assert run_in_all(meet, groups) == ["0-1"] * 2
        groups[0].client.num_failures = 100
        with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
            KeyValueStore("test", groups[0]).write("name", "text")


def measure_meeting(count):
    """Return the calls and texts of all processes for a meeting in which the last one is late."""

    def come(group):
        time.sleep(0.3 * (group.process_id == count - 1))
        return meet(group)

    with simulate_processes(count) as groups:
        run_in_all(come, groups)
        calls = [sum(group.client.calls.values()) for group in groups]
        return max(calls[1:]), sum(group.client.num_texts for group in groups) / count


def test_the_traffic_of_a_meeting_is_linear_in_the_number_of_processes():
    """A process makes as many calls among 40 as among 10, and each text is read a few times in all."""
    calls, texts = zip(measure_meeting(10), measure_meeting(40), strict=True)
    assert max(calls) < 30  # Pauses grow from 0.02 s by a tenth of the time that passed.
    assert max(texts) < 40  # Were each process to read the texts of all, there would be hundreds a process.
