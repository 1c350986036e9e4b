"""XLA flags are set before JAX first computes."""

import os
import subprocess
import sys

import pytest

from dit_video.core.platform import xla_flags
from dit_video.core.platform.provenance import get_code_version
from support.devices import PROGRAMS

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
EIGEN = "-LIBRARY_FUSION_TYPE_DOT,-LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"


@pytest.mark.parametrize(
    ("before", "release", "after"),
    [
        ("", "0.10.2", FLAG + EIGEN),
        ("--a=1", "0.10.2", f"--a=1 {FLAG}{EIGEN}"),
        (f"{FLAG}mine", "0.10.2", f"{FLAG}mine"),
        ("--a=1", "0.11.0", "--a=1"),
        ("--a=1", "0.99.0", "--a=1"),
    ],
)
def test_flags_are_added_once_for_old_releases_unless_they_are_set(monkeypatch, before, release, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(xla_flags, "version", lambda _: release)
    xla_flags.set_cpu_flags()
    xla_flags.set_cpu_flags()
    assert os.environ["XLA_FLAGS"] == after


def test_a_release_that_needs_no_flags_leaves_the_variable_unset(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "undone by monkeypatch")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(xla_flags, "version", lambda _: "0.11.0")
    xla_flags.set_cpu_flags()
    assert "XLA_FLAGS" not in os.environ


def run(program, *arguments, **variables):
    inherited = {name: value for name, value in os.environ.items() if name not in xla_flags.VARIABLES}
    command = [sys.executable, "-P", str(PROGRAMS / program), *arguments]
    return subprocess.run(command, env=inherited | variables, capture_output=True, text=True, check=False)


def format_flags(flags):
    return " ".join(f"--{name}={value}" for name, value in flags.items())


def test_this_release_of_xla_accepts_the_flags():
    done = run("cpu_products.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_this_release_of_xla_knows_the_flags_for_gpus():
    """They are parsed on CPUs, too; they have not been run on a GPU."""
    done = run("cpu_products.py", XLA_FLAGS=format_flags(xla_flags.GPU_FLAGS))
    assert done.returncode == 0, done.stderr
    done = run("cpu_products.py", XLA_FLAGS="--xla_gpu_no_such_flag=true")
    assert done.returncode != 0
    assert "Unknown flag" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1"])
def test_libtpu_accepts_the_flags(topology):
    pytest.importorskip("libtpu")
    flags = xla_flags.make_tpu_flags(topology.partition(":")[0])
    done = run("tpu_product.py", topology, LIBTPU_INIT_ARGS=format_flags(flags))
    assert done.returncode == 0, done.stderr
    done = run("tpu_product.py", topology, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true")
    assert "Unknown command line flag" in done.stderr


@pytest.fixture
def environment(monkeypatch):
    """Return a function that pretends to be on a machine with accelerators, and returns the variables that it set."""
    own = (xla_flags.SWITCH, "XLA_CLIENT_MEM_FRACTION", "JOB_COMPLETION_INDEX", *xla_flags._PROCESS_COUNTS)
    for name in (*xla_flags.VARIABLES, *own):
        monkeypatch.setenv(name, "undone by monkeypatch")
        monkeypatch.delenv(name)

    def start(*, gpus=(), count=2, chip=None, release="0.10.2", **variables):
        monkeypatch.setattr(xla_flags, "find_gpu_backends", lambda: list(gpus))
        monkeypatch.setattr(xla_flags, "count_gpus", lambda: count)
        monkeypatch.setattr(xla_flags, "has_tpu", lambda: chip is not None)
        monkeypatch.setattr(xla_flags, "find_tpu_chip", lambda: chip)
        monkeypatch.setattr(xla_flags, "version", lambda _: release)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        xla_flags.set_accelerator_flags()
        xla_flags.set_accelerator_flags()
        return {name: os.environ[name] for name in xla_flags.VARIABLES if name in os.environ}

    return start


@pytest.mark.parametrize(
    ("count", "variables", "has_flags"),
    [
        (2, {}, True),
        (1, {}, False),  # no collectives, which could overlap with computation
        (1, {"NUM_PROCESSES": "1"}, False),
        (1, {"NUM_PROCESSES": "2"}, True),
        (1, {"SLURM_NTASKS": "8"}, True),
        (1, {"JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
@pytest.mark.parametrize("release", list(xla_flags.CPU_FLAGS))
def test_several_gpus_get_their_flags_and_each_most_of_its_memory(environment, count, variables, has_flags, release):
    flags = {"XLA_FLAGS": format_flags(xla_flags.GPU_FLAGS)} if has_flags else {}
    found = environment(gpus=["cuda"], count=count, release=release, **variables)
    assert found == flags | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}


@pytest.mark.parametrize(
    ("platform", "release", "unchecked"),
    [
        ("cpu", "0.12.0.1", None),
        ("gpu", "0.99.0", "jaxlib 0.99.0"),
        ("tpu", "0.0.99", "libtpu 0.0.99"),
        ("tpu", "0.0.50.1", None),
    ],
)
def test_a_release_that_the_flags_were_not_checked_with_is_found(monkeypatch, platform, release, unchecked):
    monkeypatch.setattr(xla_flags, "version", lambda _: release)
    assert xla_flags.find_unchecked_release(platform) == unchecked
    monkeypatch.setenv(xla_flags.SWITCH, "off")
    assert xla_flags.find_unchecked_release(platform) is None


@pytest.mark.parametrize(
    ("platform", "chip", "count", "flags"),
    [
        ("cpu", "cpu", 2, {"XLA_FLAGS": "--a=1"}),
        ("gpu", "h100", 1, {"XLA_FLAGS": "--a=1"}),
        ("gpu", "h100", 2, {"XLA_FLAGS": f"--a=1 {format_flags(xla_flags.GPU_FLAGS)}"}),
        ("tpu", "v5p", 1, {"LIBTPU_INIT_ARGS": format_flags(xla_flags.make_tpu_flags("v5p"))}),
    ],
)
def test_plans_name_the_flags_of_a_run(monkeypatch, platform, chip, count, flags):
    monkeypatch.setenv("XLA_FLAGS", "--a=1")
    monkeypatch.setattr(xla_flags, "version", lambda name: "0.0.42.1" if name == "libtpu" else "0.10.2")
    assert xla_flags.list_flags(platform, chip, count) == flags


def test_a_tpu_gets_the_flags_of_its_chip(environment):
    flags = environment(chip="v6e", release="0.0.42.1")
    assert flags == {"LIBTPU_INIT_ARGS": format_flags(xla_flags.make_tpu_flags("v6e"))}
    assert "vmem_limit_kib=98304" in flags["LIBTPU_INIT_ARGS"]
    assert "vmem" not in format_flags(xla_flags.make_tpu_flags("v4"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"gpus": ["rocm"]}, {}),
        ({"chip": "v6e", "release": "0.0.99"}, {}),
        ({"gpus": ["cuda"], "release": "0.99.0"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}),
        ({"gpus": ["cuda"], "release": "0.99.0", "XLA_CLIENT_MEM_FRACTION": ".5"}, {}),
        ({"gpus": ["cuda"], "DIT_VIDEO_XLA_FLAGS": "off"}, {}),
        ({"chip": "v5p", "release": "0.0.42.1", "DIT_VIDEO_XLA_FLAGS": "off"}, {}),
    ],
)
def test_other_platforms_and_releases_and_those_who_switch_it_off_get_no_flags(environment, options, expected):
    assert environment(**options) == expected


def test_choices_of_the_user_win(environment):
    chosen = {"LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=16384 --mine=1"}
    flags = environment(chip="v6e", release="0.0.42.1", **chosen)["LIBTPU_INIT_ARGS"]
    assert flags == " ".join([chosen["LIBTPU_INIT_ARGS"], format_flags(xla_flags.TPU_FLAGS)])
    chosen = {"XLA_FLAGS": "flags.txt", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}
    assert environment(gpus=["cuda"], **chosen).items() >= chosen.items()


def test_checkpoints_and_processes_have_the_flags_in_effect(environment):
    flags = environment(chip="v5p", release="0.0.42.1", XLA_FLAGS="--xla_dump_to=/tmp/host3 --a=1")
    get_code_version.cache_clear()
    recorded = get_code_version()["flags"]
    get_code_version.cache_clear()
    assert recorded == flags | {"XLA_FLAGS": "--a=1", "XLA_PYTHON_CLIENT_MEM_FRACTION": None}


def test_plans_are_compiled_with_the_flags_of_the_chip(monkeypatch):
    monkeypatch.setattr(xla_flags, "version", lambda _: "0.0.42.1")
    assert xla_flags.get_compiler_options("v5p") == xla_flags.make_tpu_flags("v5p")
    monkeypatch.setenv(xla_flags.SWITCH, "off")
    assert xla_flags.get_compiler_options("v5p") == {}
