import threading

import numpy as np
import pytest

from dit_video.models.encoders.embedder import FolderCache, MemoryCache


def test_the_memory_cache_keeps_the_latest_used_texts():
    values = {name: np.full((1, 2), index, np.float32) for index, name in enumerate("abc")}
    memory = MemoryCache(16)
    memory.put("a", values["a"])
    memory.put("b", values["b"])
    assert memory.get("a") is values["a"]
    memory.put("c", values["c"])
    assert memory.get("b") is None
    memory.put("a", values["b"])  # a replacement does not count twice
    assert memory.get("a") is values["b"]
    assert memory.get("c") is values["c"]
    memory.put("big", np.zeros((9, 9), np.float32))
    assert memory.get("big") is None
    assert memory.get("c") is values["c"]


def test_the_memory_counts_right_when_threads_share_it():
    memory = MemoryCache(10 * 8)

    def use(seed):
        for number in np.random.default_rng(seed).integers(0, 40, 2000):
            memory.put(str(number), np.full((1, 2), number, np.float32))
            value = memory.get(str(number))
            assert value is None or value[0, 0] == number

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(memory.get(str(number)) is not None for number in range(40)) == 10


@pytest.mark.parametrize("text", ["", "red ball", "ä/../🎈\n", "x" * 5000])
def test_any_text_can_be_cached_in_a_file(tmp_path, text):
    cache = FolderCache(tmp_path, identity="one", width=3)
    value = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert cache.get(text) is None
    cache.put(text, value)
    np.testing.assert_array_equal(cache.get(text), value)
    assert cache.get_path(text).parent.parent == tmp_path / "one"
    assert FolderCache(tmp_path, identity="two", width=3).get(text) is None
