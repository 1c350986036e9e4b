"""The benchmark of one accelerator: its choices, table and time budgets, and a rehearsal of all parts on CPU."""

import functools
import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dit_video.core.errors import UserError
from dit_video.nn.attention import AttentionInputs, make_attention
from dit_video.nn.attention.cudnn import CudnnAttention
from dit_video.planning import Topology, count_argument_bytes, find_efficiencies
from support.cudnn_emulation import EMULATED_KERNELS
from support.devices import HANG, PROGRAMS
from support.marks import mark_nightly_except

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "gpu_benchmark.py"
PARTS = ("attention", "training", "job", "epoch", "sampling", "plans")


@pytest.fixture(scope="module")
def tool(load_file):
    """Return the module of the command, whose folder is then on the path."""
    return load_file(TOOL)


@pytest.fixture
def load(tool):
    """Return a function that imports one of the benchmark's modules."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_the_pair_share_is_that_of_pairs_within_a_clip(load):
    attention = load("gpu.attention")
    assert attention.compute_pair_share([8], 8) == 1
    assert attention.compute_pair_share([4, 2], 8) == (16 + 4) / 64
    for clips in (*attention.CLIP_COUNTS, 10):
        lengths = attention.divide_tokens(32_768, clips)
        assert (len(lengths), lengths.sum()) == (clips, 32_768)
        assert attention.compute_pair_share(lengths, 32_768) == pytest.approx(1 / clips, rel=1e-6)


@pytest.mark.parametrize(("platform", "backend"), [("gpu", "cudnn"), ("tpu", "splash"), ("cpu", "chunked")])
def test_each_kind_of_inputs_and_each_number_of_clips_has_a_process_of_its_own(load, platform, backend):
    attention, leaks = load("gpu.attention"), load("gpu.leaks")
    cases = attention.list_cases(platform, attention.SMALL)
    assert {case.name for case in cases} == {
        *(f"equality and leaks of {backend}, {kind}" for kind in leaks.KINDS),
        *(f"times of {backend}, {clips} a row" for clips in ("1 clip", "4 clips", "16 clips")),
    }
    figures = [figure.name for case in cases for figure in case.figures]
    assert len(figures) == len(set(figures))


@pytest.fixture(params=["self, several clips", "cross, several clips", "self, one clip", "cross, one clip"])
def rows(request, load):
    """Return arrays and inputs of the rows that are compared."""
    leaks, attention = load("gpu.leaks"), load("gpu.attention")
    inputs = leaks.make_inputs(attention.SMALL.checked)[request.param]
    return leaks.draw_arrays(attention.SMALL.checked, inputs, "float32"), inputs


@pytest.mark.nightly
@pytest.mark.parametrize("backend", [make_attention("dense"), CudnnAttention(kernels=EMULATED_KERNELS)])
def test_the_reference_and_the_packed_backend_neither_differ_nor_leak(load, rows, backend):
    leaks, (arrays, inputs) = load("gpu.leaks"), rows
    assert leaks.measure_error(backend, arrays, inputs) < leaks.MAX_ERRORS["float32"]
    clip = 1 if inputs.segment_count == 1 else 2
    assert leaks.count_leaks(backend, arrays, inputs, clip=clip, others="large") == (0, 0.0)


@pytest.mark.nightly
def test_attention_across_clips_is_a_leak_and_an_error(load, rows):
    leaks, (arrays, inputs) = load("gpu.leaks"), rows

    def leaky(q, k, v, inputs):
        merged = AttentionInputs(jnp.ones_like(inputs.q_segments), jnp.ones_like(inputs.kv_segments))
        return make_attention("dense")(q, k, v, merged)

    clip = 1 if inputs.segment_count == 1 else 2
    assert leaks.measure_error(leaky, arrays, inputs) > leaks.MAX_ERRORS["bfloat16"]
    assert leaks.count_leaks(leaky, arrays, inputs, clip=clip, others="large").number > 0


def test_values_that_are_not_finite_show_what_is_read_and_multiplied_by_zero(load):
    leaks, attention = load("gpu.leaks"), load("gpu.attention")
    inputs = leaks.make_inputs(attention.SMALL.checked)["self, several clips"]
    arrays = leaks.draw_arrays(attention.SMALL.checked, inputs, "float32")
    assert leaks.count_leaks(make_attention("dense"), arrays, inputs, clip=2, others="not finite").number > 0


def make_machine(load, memory: float):
    models, topology = load("gpu.models"), Topology.parse("h100:1")
    return models.Machine(topology, find_efficiencies(topology.chip), int(memory))


def test_the_fastest_remat_whose_estimated_memory_fits_comes_first(load):
    models = load("gpu.models")
    training = models.make_row_training(models.FULL, "1.3 B", 1, "full")
    state = sum(count_argument_bytes(training.get_program()[1]).values())
    ranked = [models.rank_remats(training, make_machine(load, gigabytes * 1e9)) for gigabytes in (1000, 70, 42)]
    # Recomputation takes time and saves memory; cheap operations, which `dots_attention` recomputes, take none.
    assert ranked[0] == ["dots_attention", "none", "attention", "full"]
    assert ranked[1:] == [["dots_attention", "attention", "full"], ["attention", "full"]]
    assert models.rank_remats(training, make_machine(load, state)) == []


def test_the_first_remat_whose_compiled_step_fits_is_chosen(load, monkeypatch):
    models = load("gpu.models")
    machine = make_machine(load, 1e12)
    compiled = []

    class Training:
        def __init__(self, remat):
            self.remat = remat

        def compile(self):
            compiled.append(self.remat)
            return self

        @property
        def memory(self):
            return type("Memory", (), {"peak": 1e9})

    monkeypatch.setattr(models, "rank_remats", lambda training, machine: ["none", "attention", "full"])
    monkeypatch.setattr(models, "fits", lambda step, machine: step.remat == "attention")
    training, _, too_large = models.choose_remat(Training, machine)
    assert (training.remat, compiled, too_large) == ("attention", ["none", "attention"], ["none: 0.9 GiB"])
    monkeypatch.setattr(models, "fits", lambda step, machine: False)
    assert models.choose_remat(Training, machine) is None


@pytest.mark.parametrize(("model", "parameters"), [("0.1 B", 0.1e9), ("1.3 B", 1.3e9)])
def test_models_have_the_parameters_of_their_names(load, model, parameters):
    models = load("gpu.models")
    for clips, grids in models.FULL.clips.items():
        assert len(grids) == clips
        assert 0.999 < sum(grid.volume for grid in grids) / models.FULL.tokens <= 1
    shapes = jax.eval_shape(lambda key: models.init_params(models.FULL.models[model].make, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(parameters, rel=0.1)


def test_every_method_trains_on_every_clip_once(load):
    epoch = load("gpu.epoch")
    size = epoch.SMALL
    for method in epoch.METHODS:
        plan = epoch.plan_batches(method, size)
        clips = [clip for _, rows in plan.steps for row in rows for clip in row]
        assert set(clips) == set(range(size.clips)) or method == "buckets"
        for shape, rows in plan.steps:
            assert len(rows) * shape.tokens <= size.training.tokens
            assert all(sum(plan.grids[clip].volume for clip in row) <= shape.tokens for row in rows)
    padded, buckets, packed = (epoch.plan_batches(method, size) for method in epoch.METHODS)
    assert padded.padding > packed.padding
    assert (len(padded.shapes), len(packed.shapes)) == (1, 1)
    assert 1 < len(buckets.shapes) <= size.buckets
    assert buckets.kept < 1 == padded.kept == packed.kept


def test_batches_are_made_in_order(load):
    assert list(load("gpu.epoch").iterate_ahead(lambda index: index**2, range(7))) == [0, 1, 4, 9, 16, 25, 36]


def test_the_budgets_of_all_parts_are_12_minutes(tool):
    assert tuple(tool.PART_SECONDS) == PARTS
    assert sum(tool.PART_SECONDS.values()) <= 12 * 60


def write_trace(folder, threads, kernels):
    """Write a trace of the profiler: its threads by number, and kernels with thread, microseconds and details."""
    names = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": threads[tid]}} for tid in threads
    ]
    events = [
        {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": start, "dur": duration, "args": details}
        for tid, name, start, duration, details in kernels
    ]
    file = folder / "host.trace.json.gz"
    file.write_bytes(gzip.compress(json.dumps({"traceEvents": [*names, *events]}).encode()))
    return file


def test_kernels_of_a_trace_are_told_by_class_with_their_shares(load, tmp_path):
    kernels = load("gpu.kernels")
    threads = {1: "Stream #13(Compute)", 2: "XLA Ops", 3: "Stream #14(MemcpyD2D)"}
    traced = [
        (1, "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", 0, 300, {}),
        (1, "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 300, 500, {}),
        (2, "custom-call.3", 0, 300, {"hlo_op": "custom-call.3"}),  # the same once more
        (1, "loop_multiply_fusion", 800, 10, {}),
        (1, "loop_multiply_fusion", 820, 30, {}),
        (3, "MemcpyD2D", 840, 160, {}),  # at the same time for 10
    ]
    table = kernels.summarize(kernels.read_kernels(write_trace(tmp_path, threads, traced)), steps=1)
    assert list(table["classes"]) == ["products", "attention", "copies", "other fusions"]
    assert table["classes"]["products"] == {"share": pytest.approx(0.5), "a step": 1, "short": 0}
    assert table["classes"]["other fusions"] == {"share": pytest.approx(0.04), "a step": 2, "short": 1}
    assert table["idle"] == pytest.approx(0.01)
    assert next(iter(table["largest"])).startswith("nvjet")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256", "products"),
        ("sm90_xmma_conv_fprop", "products"),
        ("loop_convolution_fusion", "products"),
        ("loop_convert_fusion", "other fusions"),
        ("wrapped_convert", "other fusions"),
        ("input_convert_reduce_fusion", "reductions"),
        ("ncclDevKernel_AllGather", "collectives"),
        ("cudnn_generated_fort_native_sdpa_flash", "attention"),
    ],
)
def test_kernels_have_classes_by_their_names(load, name, kind):
    assert load("gpu.kernels").classify(name) == kind


def test_operations_are_the_kernels_of_a_trace_without_streams(load, tmp_path):
    kernels = load("gpu.kernels")
    traced = [(1, "dot.4", 0, 10, {"hlo_op": "dot.4"}), (1, "a host's function", 0, 100, {})]
    found = kernels.read_kernels(write_trace(tmp_path, {1: "tf_XLAEigen/1"}, traced))
    assert [kernel.name for kernel in found] == ["dot.4"]
    assert kernels.summarize([], steps=1) == {}


@pytest.mark.parametrize(
    ("seconds", "budget", "repeats", "calls"),
    [
        (4.0, 10, 100, 3),  # two calls before the measurement, and one value although the budget is spent
        (1.0, 1000, 100, 5),  # three values of a second are enough
        (1.0, 1000, 2, 4),
        (0.05, 1000, 2, 6),  # two calls a value
    ],
)
def test_a_measurement_ends_with_its_budget(load, monkeypatch, seconds, budget, repeats, calls):
    timer, now, called = load("timer"), [0.0], []

    def call():
        called.append(now[0])
        now[0] += seconds

    monkeypatch.setattr(timer.time, "perf_counter", lambda: now[0])
    assert timer.time_repeated(call, timer.TimeBudget(budget, clock=lambda: now[0]), repeats=repeats) == pytest.approx(
        seconds
    )
    assert len(called) == calls


def test_a_spent_budget_is_an_error(load):
    timer, now = load("timer"), [0.0]
    budget = timer.TimeBudget(10, clock=lambda: now[0])
    now[0] = 9.5
    assert (budget.remaining, budget.is_spent) == (0.5, False)
    budget.check()
    now[0] = 12
    assert (budget.remaining, budget.is_spent) == (0, True)
    with pytest.raises(UserError, match="the time was spent"):
        budget.check()


@pytest.fixture
def make_document(load, tmp_path):
    return lambda small=True: load("gpu.figures").Document(tmp_path / "figures.json", is_small=small)


def make_case(load, name: str, *figures: str):
    classes = load("gpu.figures")
    return classes.Case(name=name, figures=tuple(classes.Figure(name=each) for each in figures), measure=iter)


def test_a_part_stops_when_its_time_is_spent_and_says_so(load, make_document, monkeypatch, capsys):
    cases, document, started = load("gpu.cases"), make_document(), []

    def start(part, name, budget, arguments, *, flags):
        started.append(name)
        yield "machine", {"platform": "gpu", "device": "H100", "jax": "0.10.2", "date": "2026-01-01"}
        yield f"{name} a", 2.5
        clock.now += 59.5

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cases, "TimeBudget", functools.partial(cases.TimeBudget, clock=lambda: clock.now))
    monkeypatch.setattr(cases, "start_case", start)
    two = [make_case(load, name, f"{name} a", f"{name} b") for name in ("one", "two")]
    cases.run_part("attention", two, document, seconds=60, arguments=[])
    assert started == ["one"]
    figures = json.loads(document.path.read_text())["parts"]["attention"]["figures"]
    assert figures["one a"] == {"value": 2.5, "device": "H100", "jax": "0.10.2", "date": "2026-01-01"}
    assert figures["one b"] == {"value": None, "reason": "the case ended without it"}
    assert figures["two a"] == {"value": None, "reason": "the 60 s of the part were spent"}
    assert "two: not measured: the 60 s of the part were spent" in capsys.readouterr().err


def test_a_case_that_fails_does_not_end_the_others(load, make_document, monkeypatch):
    cases, document = load("gpu.cases"), make_document()

    def start(part, name, budget, arguments, *, flags):
        yield "machine", {"platform": "gpu", "device": "H100", "jax": "0.10.2", "date": "2026-01-01"}
        yield ("reason", "RESOURCE_EXHAUSTED") if name == "one" else ("two a", 1)

    monkeypatch.setattr(cases, "start_case", start)
    two = [make_case(load, name, f"{name} a") for name in ("one", "two")]
    cases.run_part("plans", two, document, seconds=60, arguments=[])
    figures = json.loads(document.path.read_text())["parts"]["plans"]["figures"]
    assert figures["one a"]["reason"] == "RESOURCE_EXHAUSTED"
    assert figures["two a"]["value"] == 1
    assert [document.is_measured("plans", case) for case in two] == [False, True]


def test_a_case_prints_figures_and_the_reason_why_it_ended(load, capsys):
    cases, timer = load("gpu.cases"), load("timer")

    def measure(budget):
        yield "a", 1.5
        raise UserError("cudnn is not there")

    case = load("gpu.figures").Case(name="one", figures=(), measure=measure)
    assert cases.print_case(case, timer.TimeBudget(1)) == 0
    machine, *rest = map(json.loads, capsys.readouterr().out.splitlines())
    assert machine["machine"]["platform"] == "cpu"
    assert rest == [{"a": 1.5}, {"reason": "cudnn is not there"}]


def test_figures_of_parts_are_merged_and_written_as_they_appear(make_document):
    machine = {"device": "H100", "jax": "0.10.2", "date": "2026-01-01"}
    make_document().add("attention", "a", 1.0, machine)
    make_document().add("epoch", "b", 2.0, machine)
    make_document().add("attention", "a", 3.0, machine)
    content = json.loads(make_document().path.read_text())
    values = {
        part: {name: each["value"] for name, each in of["figures"].items()} for part, of in content["parts"].items()
    }
    assert values == {"attention": {"a": 3.0}, "epoch": {"b": 2.0}}
    with pytest.raises(UserError, match=r"figures are of small sizes, these are of full ones\. Use another file"):
        make_document(False)


def test_the_table_has_every_figure_with_its_target_and_machine(load, make_document):
    classes, document = load("gpu.figures"), make_document()
    figures = (
        classes.Figure(name="MFU", unit="%", target=">= 45 %"),
        classes.Figure(name="remat"),
        classes.Figure(name="memory", unit="GiB"),
        classes.Figure(name="step"),
    )
    case = classes.Case(name="case", figures=figures, measure=iter)
    machine = {"device": "H100", "jax": "0.10.2", "date": "2026-01-01"}
    document.add("training", "MFU", 0.4567, machine)
    document.add("training", "remat", "full", machine)
    document.mark_unmeasured(
        "training", classes.Case(name="case", figures=figures[:3], measure=iter), "it does not fit"
    )
    lines = classes.format_table({"training": [case]}, document.content).splitlines()
    assert lines[2:] == [
        "| training | MFU | 45.7 % | >= 45 % | H100, jax 0.10.2, 2026-01-01, small sizes |",
        "| training | remat | full |  | H100, jax 0.10.2, 2026-01-01, small sizes |",
        "| training | memory | not measured: it does not fit |  |  |",
        "| training | step | not run on a GPU |  |  |",
    ]


def test_a_case_is_started_as_this_process_was(load):
    cases = load("gpu.cases")
    started = ["python", "-P", "program.py", "tool.py", "attention", "--small"]
    prefix = cases.get_command_prefix(started, ["tool.py", "attention", "--small"])
    assert prefix == [sys.executable, "-P", "program.py", "tool.py"]
    assert cases.get_command_prefix(["pytest", "-q"], ["tool.py", "plans"]) == [sys.executable, "tool.py"]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sampler"],
            "part 'sampler' is invalid: it does not exist. Use attention, training, job, epoch, sampling, plans.",
        ),
        (["--seconds", "0"], "--seconds 0.0 is invalid: it must be at least 1. Use --seconds 1."),
        (["--table", "nowhere.json"], "no such file: nowhere.json"),
        (["--table", ROOT / "pyproject.toml"], "is not valid JSON"),
        (
            ["attention", "--json", "{folder}/new.json"],
            "device 'cpu' is invalid: the sizes are for a GPU or a TPU. Use one, or --small to try the parts",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(script, tmp_path, arguments, message):
    ended = script("tools/gpu_benchmark.py", *(str(each).format(folder=tmp_path) for each in arguments))
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert message in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("part", mark_nightly_except(("training",), PARTS))
def test_a_part_is_rehearsed_with_the_packages_that_it_needs_on_a_gpu_machine(part, tmp_path):
    """The job is that of a user, who has all packages; the others do with what a machine with JAX has."""
    target = tmp_path / "figures.json"
    without = [] if part == "job" else [PROGRAMS / "script_without_packages.py"]
    command = [sys.executable, "-P", *without, TOOL, part, "--small", "--json", target]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        list(map(str, [*command, "--seconds", HANG])),
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(target.read_text())
    assert [*content["parts"]] == [part]
    figures = content["parts"][part]["figures"]
    values = {name: each["value"] for name, each in figures.items()}
    assert {name: figures[name]["reason"] for name, value in values.items() if value is None} == {}
    assert {(each["device"], each["jax"]) for each in figures.values()} == {("cpu", jax.__version__)}
    for name, value in values.items():
        if any(each in name for each in ("MFU", "expected / measured", "pair share", "seconds")):
            assert value > 0, name
    if part == "attention":
        assert all(value == 0 for name, value in values.items() if "depend on others" in name)
        errors = {name: value for name, value in values.items() if "largest error" in name}
        assert len(errors) == 8
        assert all(value <= (2e-5 if "float32" in name else 2e-2) for name, value in errors.items())
    if part == "epoch":
        assert values["padded: compilations"] == values["packed: compilations"] == 1
        assert values["buckets: compilations"] > 1
        assert values["packed: padding"] < values["padded: padding"]
    # The table of the same file lists the same figures.
    table = subprocess.run(
        [sys.executable, TOOL, "--table", target], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert table == done.stdout
    assert not any(f"| {part} |" in row and "not " in row for row in table.splitlines())
