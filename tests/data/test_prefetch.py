"""Prefetching of values in a thread."""

import threading

import pytest

from dit_video.core.errors import UserError
from dit_video.data.prefetch import prefetch
from support.devices import wait_until


def test_prefetching_keeps_order_errors_and_the_end():
    def values():
        yield from range(5)
        raise UserError("broken")

    ahead = prefetch(values())
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="broken"):
        next(ahead)
    assert list(prefetch(iter(range(3)))) == [0, 1, 2]
    endless = prefetch(iter(lambda: 1, 2), depth=1)
    next(endless)
    endless.close()
    wait_until(lambda: all(thread.name != "prefetch" for thread in threading.enumerate()))
