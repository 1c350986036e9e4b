"""Batches are decoded ahead of their encoding in parts, so that memory stays bounded."""

import threading

import pytest

from dit_video.core.errors import UserError
from dit_video.data.loader import LoaderConfig, PieceDecoder, count_parts, encode_ahead, get_part_range
from support.devices import wait_until


class Counted(PieceDecoder):
    """Batches of six numbers, with a count of those that are made and not yet encoded."""

    max_pieces, max_bytes = 6, 600

    def __init__(self):
        self.lock, self.waiting, self.peak = threading.Lock(), 0, 0

    def count(self, step):
        return 6 if step % 2 else 4

    def decode(self, step, part, num_parts):
        pieces = [10 * step + index for index in get_part_range(self.count(step), part, num_parts)]
        with self.lock:
            self.waiting += len(pieces)
            self.peak = max(self.peak, self.waiting)
        return pieces

    def encoded(self, pieces):
        with self.lock:
            self.waiting -= len(pieces)
        return pieces


@pytest.mark.parametrize(("ahead_bytes", "parts"), [(100, 6), (500, 6), (1500, 2), (3000, 1)])
def test_the_number_of_waiting_batches_is_bounded(ahead_bytes, parts):
    counted, reading = Counted(), LoaderConfig(batch=6, seed=0, threads=2, start_step=3, ahead_bytes=ahead_bytes)
    assert count_parts(counted, reading) == parts
    batches = encode_ahead(counted, counted.encoded, reading)
    for step in range(3, 9):
        assert next(batches) == [10 * step + index for index in range(counted.count(step))]
    batches.close()
    # Of 2 threads 5 elements, each a part of a batch, and the batch that is put together.
    assert counted.peak <= 5 * 6 // parts + 6


def test_an_error_of_the_encoder_is_raised_after_the_batches_before_it_and_close_ends_the_threads():
    def encode(pieces):
        if pieces[0] == 30:
            raise UserError("broken")
        return pieces[0]

    batches = encode_ahead(Counted(), encode, LoaderConfig(batch=6, seed=0))
    assert [next(batches) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(UserError, match="broken"):
        next(batches)
    batches.close()
    endless = encode_ahead(Counted(), lambda pieces: pieces[0], LoaderConfig(batch=6, seed=0, start_step=4))
    assert next(endless) == 40
    endless.close()
    wait_until(lambda: all("thread-prefetch" not in thread.name for thread in threading.enumerate()))
