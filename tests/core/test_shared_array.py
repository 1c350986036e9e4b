"""Arrays and strings that are pickled as paths, and mapped by the process that reads them."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dit_video.core.shared_array import MIN_SHARED_BYTES, SharedArray, SharedStrings, SharesArrays, get_shared_folder


class Plan(SharesArrays):
    def __init__(self, count):
        self.values, self.name = np.arange(count), "a"


def test_a_large_array_is_pickled_as_a_path_and_a_small_one_with_its_values():
    for count, is_mapped in ((MIN_SHARED_BYTES, True), (4, False)):
        content = pickle.dumps(Plan(count))
        assert len(content) < 1000
        loaded = pickle.loads(content)
        np.testing.assert_array_equal(loaded.values, np.arange(count))
        assert loaded.values.flags.writeable != is_mapped
        assert loaded.name == "a"


def test_a_copy_has_the_same_arrays():
    plan = Plan(MIN_SHARED_BYTES)
    assert copy.copy(plan).values is plan.values
    np.testing.assert_array_equal(copy.deepcopy(plan).values, plan.values)


def test_equal_arrays_share_a_file_and_others_do_not():
    values = np.random.default_rng(0).integers(0, 9, 4096)
    before = set(get_shared_folder().iterdir())
    for _ in range(3):
        pickle.dumps(SharedArray(values.copy()))
    pickle.dumps(SharedArray(values.reshape(64, 64)))
    pickle.dumps(SharedArray(values.astype(np.int32)))
    assert len(set(get_shared_folder().iterdir()) - before) == 3


@pytest.mark.parametrize("values", [np.zeros(0), np.float64(3.0).reshape(()), np.asfortranarray(np.ones((50, 30)))])
def test_arrays_of_any_shape_are_mapped(values):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(SharedArray(values))), values)


def test_strings_are_read_by_number():
    strings = ["", "a/b.mp4#3", "\u00fc\u4e2d", "\udc80"] * 400
    shared = SharedStrings(strings)
    content = pickle.dumps(shared)
    assert len(content) < 1000
    loaded = pickle.loads(content)
    assert list(loaded) == strings == list(shared)
    assert (loaded[-1], loaded[1:3], len(loaded)) == (strings[-1], strings[1:3], len(strings))
    with pytest.raises(IndexError):
        loaded[len(strings)]


def test_the_files_are_removed_when_the_process_exits():
    program = """
import numpy as np, pickle
from dit_video.core.shared_array import SharedArray, get_shared_folder
pickle.dumps(SharedArray(np.zeros(9999)))
assert len(list(get_shared_folder().iterdir())) == 1
print(get_shared_folder())
"""
    folder = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(folder).name.startswith("dit_video_")
    assert not Path(folder).exists()
