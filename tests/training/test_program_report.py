"""What a training runs is told from its compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dit_video.core.hlo import AttentionCall, CollectiveTraffic, Program
from dit_video.core.platform import xla_flags
from dit_video.core.platform.chips import CHIPS
from dit_video.distributed.mesh import AXES
from dit_video.nn.attention import AttentionInputs, Full, TimeOnly, make_attention
from dit_video.training.program_report import PROGRAM_FILE, ProgramLog, ProgramReport, describe_program
from dit_video.training.step import JittedStep
from support.compilations import count_compilations

CUDNN = AttentionCall("cudnn", "Full", "self")
KERNELS = {"__cudnn$fmhaSoftmax": 24, "__cudnn$fmhaSoftmaxBackward": 24}
MESH = {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
GATHERED = {("all-gather", ("fsdp",)): CollectiveTraffic("all-gather", ("fsdp",), 2.0**31, 48)}


def make_report(*, platform="gpu", chip=CHIPS["h200"], mesh=MESH, attention=None, **parts):
    attention = {CUDNN: KERNELS} if attention is None else attention
    values = {"flops": 4.0, "product_flops": {"f32": 1.0, "bf16": 3.0}, "recomputed_flops": 1.0, "kernels": KERNELS}
    program = Program(**{"collectives": GATHERED, **values, **parts}, attention=attention)
    return describe_program(program, mesh, platform, chip, flags={"XLA_FLAGS": "--a=1", "LIBTPU_INIT_ARGS": None})


def test_the_table_has_attention_kernels_dtypes_recomputation_collectives_flags_and_the_peak():
    assert list(make_report().lines()) == [
        "attention      self, Full: cudnn, __cudnn$fmhaSoftmax 24 times, __cudnn$fmhaSoftmaxBackward 24 times",
        "kernels        __cudnn$fmhaSoftmax 24 times, __cudnn$fmhaSoftmaxBackward 24 times",
        "products       75.0% bf16, 25.0% f32; 25.0% recomputed",
        "all-gather         over fsdp                 2.00 GiB, 48 times",
        "flags          --a=1",
        "peak           989 TFLOP/s a device: NVIDIA H200 SXM data sheet, without sparsity",
    ]


def test_an_unknown_device_has_no_peak_and_an_empty_program_no_shares():
    report = make_report(chip=None, attention={}, flops=0.0, product_flops={}, recomputed_flops=0.0, kernels={})
    lines = list(report.lines())
    assert lines[:2] == ["kernels        none", "products       none; 0.0% recomputed"]
    assert lines[-1] == "peak           unknown, so that there is no MFU"
    assert "program_peak_flops" not in report.get_metrics()


def test_both_cores_of_a_chip_have_half_its_peak():
    assert make_report(chip=CHIPS["v7x"], attention={}).peak == CHIPS["v7x"].flops / 2


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"attention": {CUDNN: {}}}, "self-attention of the pattern Full was to be that of cudnn"),
        ({"attention": {CUDNN: {"TopK": 3}}}, "the program has none of its kernels"),
        ({"attention": {CUDNN._replace(backend="splash"): KERNELS}}, "was to be that of splash"),
        (
            {"attention": {CUDNN._replace(backend="chunked"): {}}},
            "self-attention of the pattern Full has no kernel: this GPU",
        ),
        ({"mesh": MESH | {"context": 4}}, "the mesh axis context has 4 devices, but nothing is moved along it"),
        ({"collectives": {}}, "the mesh axis fsdp has 8 devices"),
    ],
)
def test_what_should_run_and_does_not_is_a_warning(changes, warning):
    (found,) = make_report(**changes).warnings
    assert warning in found


def test_a_release_without_checked_flags_is_a_warning(monkeypatch):
    monkeypatch.setattr(xla_flags, "version", lambda _: "0.99.0")
    assert make_report().warnings == ("no flags of XLA are set for jaxlib 0.99.0, with which none was checked",)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"platform": "cpu", "attention": {CUDNN._replace(backend="chunked"): {}}},  # plain XLA is all that it has
        {"attention": {CUDNN._replace(backend="dense", kind="cross"): {}}},
        {"collectives": {("all-reduce", ("part of", "fsdp")): CollectiveTraffic("all-reduce", ("part of", "fsdp"))}},
        {
            "mesh": MESH | {"data": 2},
            "slice_transfers": {("all-reduce", ("data",)): CollectiveTraffic("all-reduce", ("data",), 8.0, 1, True)},
        },
    ],
)
def test_what_runs_as_it_should_is_no_warning(changes):
    assert make_report(**changes).warnings == ()


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = make_report()
    report.write(tmp_path)
    assert ProgramReport.read(tmp_path) == report
    assert ProgramReport.read(tmp_path / "other") is None


@pytest.mark.parametrize("content", ["{}", '{"moved": null, "warnings": [], "later": 1}', '{"moved"', "[]"])
def test_a_report_that_is_damaged_or_of_another_version_is_none(tmp_path, content):
    (tmp_path / PROGRAM_FILE).write_text(content)
    assert ProgramReport.read(tmp_path) is None


def test_the_numbers_are_logged():
    assert make_report().get_metrics() == {
        "program_kernel_calls": 48,
        "program_recomputed": 0.25,
        "program_products_bf16": 0.75,
        "program_products_f32": 0.25,
        "program_bytes_fsdp": 2.0**31,
        "program_peak_flops": 989e12,
    }


@pytest.fixture
def log(tmp_path):
    return ProgramLog(tmp_path, Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES))


def test_every_program_is_compiled_once_and_reported(log, tmp_path, capsys):
    def update(state, batch, constants):
        return jax.tree.map(lambda leaf: leaf + batch.sum() + constants[0], state), {}

    step = JittedStep(update, (jnp.ones(()),), log.observe)
    state, batches = {"w": jnp.zeros(3)}, [jnp.ones(4), jnp.ones(4), jnp.ones(5)]
    before, run = count_compilations(), step.specialize(state)
    for batch in batches:
        state, _ = run(state, batch)
    assert count_compilations() - before == 2
    np.testing.assert_array_equal(state["w"], 4 + 1 + 4 + 1 + 5 + 1)
    assert capsys.readouterr().err.count("kernels        none") == 1  # a table that says the same is not repeated
    assert (tmp_path / PROGRAM_FILE).is_file()
    assert log.derive({})["program_kernel_calls"] == 0
    assert log.derive({}) == {}


@pytest.mark.parametrize("backend", ["dense", "chunked", "auto"])
@pytest.mark.parametrize("pattern", [Full(), TimeOnly()])
def test_attention_is_found_in_a_compiled_gradient(log, tmp_path, backend, pattern):
    ids = jnp.ones((1, 64), jnp.int32)
    inputs = AttentionInputs.self_attention(ids, jnp.zeros((1, 64, 3), jnp.int32))

    def loss(x):
        return make_attention(backend, pattern=pattern, chunk=16)(x, x, x, inputs).sum()

    log.observe(jax.jit(jax.grad(loss)).lower(jnp.ones((1, 64, 2, 8))).compile())
    name = "dense" if backend == "auto" else backend
    assert ProgramReport.read(tmp_path).attention == {f"self, {type(pattern).__name__}: {name}": {}}
