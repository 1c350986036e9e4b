"""Batches are read ahead of their encoding in parts, so that memory stays bounded."""

import threading

import pytest

from dit_video.core.errors import UserError
from dit_video.data.prefetch import Prefetch
from support.devices import wait_until


class Counted:
    """Batches of six numbers, with a count of those that are read and not yet combined."""

    def __init__(self, parts=1):
        self.parts, self.lock, self.waiting, self.peak = parts, threading.Lock(), 0, 0

    def read(self, number):
        batch, part = divmod(number, self.parts)
        pieces = [10 * batch + index for index in range(6)][part * 6 // self.parts : (part + 1) * 6 // self.parts]
        with self.lock:
            self.waiting += len(pieces)
            self.peak = max(self.peak, self.waiting)
        return pieces

    def combine(self, pieces):
        with self.lock:
            self.waiting -= len(pieces)
        return pieces


@pytest.mark.parametrize(("ahead_bytes", "parts"), [(500, 6), (1500, 2), (3000, 1)])
def test_the_number_of_waiting_batches_is_bounded(ahead_bytes, parts):
    counted, prefetch = Counted(parts), Prefetch(threads=2, ahead_bytes=ahead_bytes)
    assert prefetch.count_parts(600) == parts
    batches = prefetch.iterate(counted.read, counted.combine, start=3, parts=parts)
    for number in range(3, 9):
        assert next(batches) == [10 * number + index for index in range(6)]
    batches.close()
    # Of 2 threads 5 elements, each a part of a batch, and the batch that is put together.
    assert counted.peak <= 5 * 6 // parts + 6


def test_an_error_of_the_encoder_is_raised_after_the_batches_before_it_and_close_ends_the_threads():
    def combine(pieces):
        if pieces[0] == 30:
            raise UserError("broken")
        return pieces[0]

    batches = Prefetch().iterate(Counted().read, combine, start=0, parts=1)
    assert [next(batches) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(UserError, match="broken"):
        next(batches)
    batches.close()
    endless = Prefetch().iterate(Counted().read, lambda pieces: pieces[0], start=4, parts=1)
    assert next(endless) == 40
    endless.close()
    wait_until(lambda: all("thread-prefetch" not in thread.name for thread in threading.enumerate()))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threads": 0}, "threads=0"), ({"workers": -1}, "workers=-1"), ({"ahead_bytes": 0}, "ahead_bytes=0")],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Prefetch(**options)
