import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dit_video.core.platform.compilation_cache import choose_cache_folder, enable_compilation_cache, is_on_network_disk
from support.devices import PROGRAMS, run_together

MOUNTS = """\
overlay / overlay rw 0 0
server:/home /home nfs4 rw,vers=4.1 0 0
/dev/sda1 /home/local ext4 rw 0 0
bucket /mnt/my\\040bucket fuse.gcsfuse rw 0 0
fuse-overlayfs /containers fuse.fuse-overlayfs rw 0 0
10.0.0.2@tcp:/fs /scratch lustre rw 0 0
tmpfs /run tmpfs rw 0 0
"""


def start(home: Path, *arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAMS / "cached_compilation.py"), *arguments],
        env={"PYTHONPATH": str(Path(__file__).parents[3]), "XDG_CACHE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr
    return [*done.stdout.split(), *done.stderr.splitlines()]


def test_the_second_start_finds_what_the_first_compiled(tmp_path):
    folder, hits = start(tmp_path)
    assert (folder, hits) == (str(tmp_path / "dit_video" / "programs"), "0")
    assert list(Path(folder).iterdir())
    assert int(start(tmp_path)[1]) >= 1


def test_a_compilation_cache_that_is_set_stays(tmp_path):
    assert enable_compilation_cache(tmp_path) == Path(jax.config.jax_compilation_cache_dir)
    assert enable_compilation_cache(run_folder=tmp_path) == Path(jax.config.jax_compilation_cache_dir)
    assert not list(tmp_path.iterdir())


def test_the_variable_of_jax_names_the_folder_also_for_a_shared_run(tmp_path):
    other = tmp_path / "other"
    folder, _ = start(tmp_path, "gs://bucket/run", JAX_COMPILATION_CACHE_DIR=str(other))
    assert folder == str(other)


def test_a_run_of_one_process_on_a_local_disk_uses_the_cache_of_its_user(tmp_path):
    folder, _ = start(tmp_path, str(tmp_path / "run"))
    assert folder == str(tmp_path / "dit_video" / "programs")
    assert not (tmp_path / "run").exists()


def test_an_address_without_its_package_is_passed_over_with_a_warning(tmp_path):
    folder, _, *messages = start(tmp_path, "nowhere://bucket/run")
    assert folder == str(tmp_path / "dit_video" / "programs")
    assert any("compiled programs are not kept at nowhere://bucket/run/.programs (" in line for line in messages)


@pytest.mark.nightly
def test_programs_of_a_run_at_an_address_are_kept_there(tmp_path):
    """With the file system of a package that is installed: a folder of this machine as `gs://bucket`."""
    bucket = {"DIT_VIDEO_TEST_BUCKET": str(tmp_path / "buckets")}
    (tmp_path / "buckets").mkdir()
    folder, hits, *_ = start(tmp_path / "a", "gs://bucket/run", **bucket)
    assert (folder, hits) == ("gs://bucket/run/.programs", "0")
    assert list((tmp_path / "buckets" / "bucket" / "run" / ".programs").iterdir())
    assert int(start(tmp_path / "b", "gs://bucket/run", **bucket)[1]) >= 1


@pytest.mark.slow
def test_on_several_hosts_the_second_start_compiles_nothing(tmp_path, monkeypatch):
    """Only the first process writes programs; the homes of the hosts differ, and the disk of the run is shared."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    counts = []
    for _ in range(2):
        outputs = run_together("programs_of_two_processes.py", str(tmp_path / "run"), str(tmp_path / "homes"))
        lines = [next(line.split() for line in output.splitlines() if line.startswith("cache ")) for output in outputs]
        assert {line[1] for line in lines} == {str(tmp_path / "run" / ".programs")}
        counts.append([(int(requests), int(hits)) for _, _, requests, hits in lines])
    assert not (tmp_path / "homes").exists()
    first, second = counts
    assert first[0][1] < first[0][0]
    for requests, hits in second:
        assert requests == hits > 0


@pytest.mark.parametrize(
    ("path", "is_shared"),
    [
        ("/home/user/runs", True),
        ("/home/local/runs", False),
        ("/mnt/my bucket/runs", True),
        ("/mnt/my bucket2", False),
        ("/scratch", True),
        ("/containers/x", False),
        ("/run/x", False),
        ("/data", False),
    ],
)
def test_network_disks_are_recognized(path, is_shared):
    assert is_on_network_disk(path, mounts=MOUNTS) == is_shared


@pytest.mark.parametrize(
    ("home", "run", "count", "is_of_run"),
    [
        ("/home/user", "/scratch/run", 1, False),
        ("/home/user", "/scratch/run", 8, False),
        ("/home/local", "/scratch/run", 1, False),
        ("/home/local", "/scratch/run", 8, True),
        ("/home/local", "/data/run", 8, True),
        ("/home/user", "gs://bucket/run", 1, True),
        ("/home/user", "gs://bucket/run/", 8, True),
    ],
)
def test_programs_are_kept_with_the_run_only_where_its_machines_share_nothing_else(
    monkeypatch, home, run, count, is_of_run
):
    """A run on a disk of a cluster finds the programs of all earlier runs, as long as its machines have one home."""
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    folder = choose_cache_folder(run, process_count=count, mounts=MOUNTS)
    assert str(folder) == (f"{run.rstrip('/')}/.programs" if is_of_run else f"{home}/dit_video/programs")
    assert str(choose_cache_folder(process_count=count)) == f"{home}/dit_video/programs"
