import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dit_video.core.errors import UserError
from dit_video.data.ingest.formats import list_clips
from support.devices import HANG, PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "support" / "tiny.py"


@pytest.fixture(scope="module")
def benchmark(load_file):
    """Return the module of the command."""
    load_file(ROOT / "tools" / "benchmark.py")  # puts its folder on the path
    return importlib.import_module("benchmarks.settings")


@pytest.fixture(scope="module")
def quickstart(load_file):
    return load_file(ROOT / "experiments" / "configs" / "quickstart.py").EXPERIMENT


@pytest.mark.slow
def test_the_sampling_benchmark_compares_with_forward_passes(script):
    ended = script("tools/benchmark.py", "sampling", "--small", "--rounds", 1)
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)["sampling"]["small"]
    assert result["compilations"] == 0
    assert result["steps_of_forwards"] > 0
    assert result["together_of_apart"] > 0
    assert result["one_clip_together_of_apart"] > 0


@pytest.mark.slow
def test_the_training_benchmark_measures_the_cost_around_the_step(script):
    command = ["train", "--config", TINY, "--steps", 6, "--examples", 20, "--rounds", 1]
    ended = script("tools/benchmark.py", *command)
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)["train"]
    assert result["loop_overhead"] == pytest.approx(result["loop_step_ms"] / result["step_ms"] - 1, abs=1e-2)
    digest_overhead = result["step_ms"] / result["undigested_step_ms"] - 1
    assert result["digest_overhead"] == pytest.approx(digest_overhead, abs=1e-2)
    assert set(result["save_overhead"]) == {"every 6 steps", "every 4 steps"}
    assert result["restart_to_first_step_seconds"] > 0
    assert result["start_to_first_step_seconds"] > 0
    # It continued from a checkpoint, which is saved at every second step.
    assert result["restarted_after_step"] in (2, 4, 6)


@pytest.mark.slow
def test_the_benchmark_of_an_experiment_measures_all_its_parts(script, tiny, tiny_clips):
    command = ["--config", TINY, "--clips", tiny_clips, "--steps", 3, "--examples", 40, "--rounds", 1, "--batches", 30]
    ended = script("tools/benchmark.py", *command)
    assert ended.code == 0
    document = json.loads(ended.out)  # nothing else on stdout
    assert document.keys() == {
        "machine",
        "setting",
        "denoiser",
        "data",
        "packed_step_compilations",
        "autoencoder",
    }
    assert document["setting"] == "tiny"
    assert document["machine"]["platform"] == jax.devices()[0].platform
    assert document["machine"]["jax"] == jax.__version__
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["devices"] == jax.device_count()

    denoiser, data, autoencoder = document["denoiser"], document["data"]["latents"], document["autoencoder"]
    rows = tiny.EXPERIMENT.get_model().layout
    assert denoiser["compilations"] == 1
    assert data["compilations"] == 0  # the same program serves the loader's rows
    assert document["packed_step_compilations"] == 1
    assert denoiser["sizes"] >= 5
    assert denoiser["tokens_per_step"] == tiny.EXPERIMENT.denoiser.batch * rows.tokens
    assert denoiser["tokens_per_second"] == pytest.approx(
        denoiser["tokens_per_step"] / denoiser["step_ms"] * 1000, rel=0.01
    )
    assert denoiser["tokens_per_second_without_padding"] < denoiser["tokens_per_second"]
    assert denoiser["steps"] == 3
    assert np.isfinite(denoiser["loss"])
    assert 0 <= data["padding_share"] == denoiser["padding_share"] < 0.45  # rows of two clips at the most
    assert 0 <= data["waiting_share"] <= 1
    assert data["examples"] == 40
    assert data["steps"] > 3
    assert data["step_ms"] > 0
    others = document["data"]
    assert others.keys() == {"latents", "memory", "videos", "live", "decoding", "ingest"}
    assert others["memory"]["bytes"].keys() == {"3", "30"}
    for how in ("kept", "decoded at every use"):
        assert 0 <= others["videos"][how]["waiting_share"] <= 1
    for way in ("rows", "buckets"):
        for how in ("encoded", "given"):
            figures = others["live"][way][how]
            assert 0 <= figures["waiting_share"] <= 1
            assert figures["step_ms"] > 0
            assert figures["bytes"] > 1e6
            assert figures["encoding_share"] >= 0
    assert others["videos"]["clips"] == others["decoding"]["files"] == len(list_clips(tiny_clips).clips)
    assert others["ingest"]["clips"] == 200
    assert others["decoding"]["ratio"] > 0
    assert others["ingest"]["clips_per_second"].keys() == {"one", "two"}
    assert autoencoder["compilations"] == 1
    assert autoencoder["windows"] == "4 of 5x16x16"
    assert autoencoder["pixels_per_second"] == pytest.approx(
        autoencoder["tokens_per_second"] * 5 * 16 * 16 / (2 * 2 * 2), rel=0.01
    )
    for part in (denoiser, data, autoencoder):
        assert part["peak_memory"]["of"] in ("device", "process")
        assert part["peak_memory"]["bytes"] > 1e6


@pytest.mark.slow
def test_the_attention_benchmark_measures_packed_rows(script):
    ended = script("tools/benchmark.py", "attention", "--tokens", 512, "--rounds", 1)
    assert ended.code == 0
    document = json.loads(ended.out)
    assert document.keys() == {"machine", "setting", "attention"}
    for what in ("forward", "training"):
        figures = document["attention"][what]
        assert all(seconds >= 0 for seconds in figures["seconds"].values())
        assert figures["16 equal segments"]["share"] == pytest.approx(1 / 16)
        assert 1 / 12 < figures["mixed segments"]["share"] < 1 / 4


@pytest.mark.nightly
def test_the_tiling_benchmark_compares_tiles_with_whole_pictures(script, tiny_run):
    ended = script("tools/benchmark.py", "tiling", "--run", tiny_run)
    assert ended.code == 0
    result = json.loads(ended.out)["tiling"]
    errors = list(result["overlaps"].values())
    assert len(errors) == 4
    assert errors[0]["mean"] > errors[-1]["mean"] >= 0
    assert all(error["largest"] >= error["mean"] for error in errors)


@pytest.mark.slow
def test_the_benchmark_of_storage_compares_types_of_latents(script):
    ended = script("tools/benchmark.py", "latent_storage")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)["latent_storage"]
    errors, sizes = (
        [result[dtype][name] for dtype in ("float32", "bfloat16", "int8")]
        for name in ("relative_error", "bytes_per_clip")
    )
    assert errors[0] == 0 < errors[1] < errors[2] < 0.1
    assert sizes[2] < 0.65 * sizes[1] < 0.65**2 * sizes[0]
    assert result["float32"]["psnr"] == result["psnr of exact latents"]
    assert result["psnr of exact latents"] - result["int8"]["psnr"] < 0.1
    assert result["int8"]["psnr_to_exact"] > 60


@pytest.mark.slow
def test_the_model_benchmark_measures_a_transformer(script):
    ended = script("tools/benchmark.py", "model", "--small", "--rounds", 1)
    assert ended.code == 0
    model = json.loads(ended.out)["model"]
    assert model["tokens"] == 24
    assert model["losses"]["ours"][2] < model["losses"]["ours"][0]
    for what in ("forward", "training step"):
        assert model[what]["seconds"].keys() == {"ours"}
    assert model["compilation"]["ratio"] < 1.3  # 48 layers against 6


@pytest.mark.parity
@pytest.mark.nightly
def test_the_model_benchmark_compares_a_transformer_with_diffusers(script):
    ended = script("tools/benchmark.py", "model", "--small", "--rounds", 1, "--peers", "--explain", 1)
    assert ended.code == 0
    figures = json.loads(ended.out)["model"]
    explained = figures["explained"]
    assert explained["failed"] == {}
    assert {"as it is", "products by Eigen", "one thread"} <= explained["variants"].keys()
    assert explained["variants"]["one thread"]["forward"]["ratio"] > 0
    assert figures["forward"]["ratio"] > 0
    assert max(figures["difference"].values()) < 1e-4
    for name in figures["difference"]:
        np.testing.assert_allclose(figures["losses"][name], figures["losses"]["ours"], rtol=1e-3)


CHILD = """
import json, os, sys
flags, cores = os.environ["XLA_FLAGS"], len(os.sched_getaffinity(0))
if "isa" in flags:
    sys.exit("Unknown flag in XLA_FLAGS: --xla_cpu_max_isa=AVX2")
ours = {True: 3.0, False: 2.0}["+LIBRARY" in flags]
figures = {"ratio": ours / 2, "seconds": {"ours": ours, "diffusers": 2.0}}
print(json.dumps({"model": {"forward": figures, "training step": {"ratio": 1.0, "seconds": {"cores": cores}}}}))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes have all cores")
@pytest.mark.usefixtures("benchmark")
def test_the_setting_of_cpus_that_decides_is_named(monkeypatch, capsys):
    explain = importlib.import_module("benchmarks.explain")
    monkeypatch.setattr(explain, "_COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setenv("XLA_FLAGS", "--own=1")
    monkeypatch.setattr(explain, "VARIANTS", {k: v._replace(exists=True) for k, v in explain.VARIANTS.items()})
    cores = os.sched_getaffinity(0)
    found = explain.measure(3)
    assert os.sched_getaffinity(0) == cores
    assert found["decisive"] == {"forward": "products by YNNPACK", "training step": None}
    assert found["variants"]["products by YNNPACK"]["forward"]["ratios"] == [1.5, 1.5, 1.5]
    assert found["variants"]["one thread"]["training step"]["seconds"] == {"cores": 1}
    # A flag that the release lacks is told, and the others are measured.
    assert found["failed"] == {"AVX2": "Unknown flag in XLA_FLAGS: --xla_cpu_max_isa=AVX2"}
    assert "AVX2: Unknown flag" in capsys.readouterr().err


def test_settings_of_cpus_are_explained_beside_a_peer_alone(script):
    ended = script("tools/benchmark.py", "model", "--small", "--explain")
    assert (ended.code, "model --peers --explain" in ended.err) == (2, True)


# The tiny experiment's denoiser, so that its program is compiled once in these tests.
SMALL = (
    "data.max_pixels=512",
    "data.max_frames=9",
    "model.autoencoder.channels=4",
    "model.backbone.channels=4",
    "model.backbone.context_width=16",
    "model.backbone.width=24",
    "model.backbone.heads=2",
    "model.backbone.layers=1",
    "model.text_encoder.width=16",
    "model.text_encoder.heads=2",
    "model.text_encoder.max_tokens=32",
    "model.layout.tokens=12",
    "model.layout.text=96",
    "model.layout.segments=3",
    "denoiser.batch=2",
    "denoiser.optimizer.schedule.warmup=2",
)


@pytest.mark.nightly  # the rehearsal of the GPU's benchmark has these parts, too
def test_models_are_measured_where_only_jax_flax_and_optax_are_installed():
    program = str(PROGRAMS / "script_without_packages.py")
    command = [sys.executable, "-P", program, str(ROOT / "tools" / "benchmark.py"), "denoiser", "data"]
    changes = [part for change in SMALL for part in ("--set", change)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--steps", "1", "--examples", "40", *changes],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["setting"] == "built in"
    assert document["denoiser"]["compilations"] == 1
    assert document["data"].keys() == {"skipped"}
    assert document["data"]["skipped"].endswith("is not installed")
    assert "packed_step_compilations" not in document


def test_the_default_is_the_quickstart(benchmark, quickstart, monkeypatch):
    assert benchmark.load_default_setting() == quickstart
    monkeypatch.setitem(sys.modules, "dit_video.experiment", None)  # as if a package that it needs were missing
    assert benchmark.load_default_setting() is benchmark.BUILT_IN


def test_rows_of_the_quickstart_are_nearly_full(benchmark, quickstart):
    packed = benchmark.SyntheticBatches(quickstart, 400)
    assert packed.num_sizes == 9
    assert packed.padding < 0.01
    rows = next(iter(packed))
    model = quickstart.get_model()
    assert rows.tokens.shape == (quickstart.denoiser.batch, model.row_shape.tokens, model.backbone.token_width)
    assert len(np.unique(rows.examples[rows.valid])) == rows.valid.sum()


def test_sizes_are_within_the_limits_and_fit_the_model(benchmark, quickstart, tiny):
    for setting in (quickstart, tiny.EXPERIMENT):
        for size in benchmark.make_clip_sizes(setting):
            assert size.h * size.w <= setting.data.max_pixels
            assert size.t <= setting.data.max_frames
            benchmark.latent_grid(size, setting.model.autoencoder.stride)
            assert size.h % setting.model.size_multiple.h == 0


@pytest.mark.filterwarnings("ignore:a text of 501 tokens is cut")
@pytest.mark.parametrize("caption", ["", "a red circle", "a cirçle", 100 * "long "])
def test_captions_are_tokenised_as_in_training(benchmark, caption):
    tokenizer = benchmark.BUILT_IN.model.text_encoder.make_tokenizer()
    np.testing.assert_array_equal(
        benchmark.tokenize_bytes(benchmark.BUILT_IN.model.text_encoder, caption), tokenizer(caption)
    )


def test_settings_can_be_changed_by_name(benchmark, quickstart):
    wide = benchmark.replace_fields(benchmark.BUILT_IN, {"model.backbone.width": 512})
    assert wide.model.backbone.width == 512
    assert sum(wide.model.backbone.rotary_embedding.split) == 128
    assert benchmark.BUILT_IN.model.backbone.width != 512
    changed = benchmark.replace_fields(quickstart, {"model.backbone.patch": (1, 1, 1), "denoiser.batch": 16})
    assert (changed.model.backbone.patch.volume, changed.denoiser.batch) == (1, 16)
    with pytest.raises(UserError, match="'depth' does not exist; use one of channels"):
        benchmark.replace_fields(benchmark.BUILT_IN, {"model.backbone.depth": 3})
    with pytest.raises(UserError, match="'w' does not exist; use one of"):
        benchmark.replace_fields(benchmark.BUILT_IN, {"denoiser.batch.w": 3})


def test_fields_that_must_agree_are_changed_together(benchmark):
    changes = {"model.backbone.context_width": 16, "model.text_encoder.width": 16}
    assert benchmark.replace_fields(benchmark.BUILT_IN, changes).model.backbone.context_width == 16
    with pytest.raises(UserError, match="the text encoder has width=64"):
        benchmark.replace_fields(benchmark.BUILT_IN, {"model.backbone.context_width": 16})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sampler"], "part 'sampler' is invalid: it does not exist. Use denoiser, autoencoder, data"),
        (["--config", "nowhere.py"], "nowhere.py does not exist; use"),
        (["--config", ROOT / "tests" / "conftest.py"], "defines no EXPERIMENT"),
        (["--steps", "0"], "must be at least 1"),
        (["--set", "model.backbone.depth=3"], "'depth' does not exist; use one of"),
        (["--set", "model.backbone.heads=7"], "must be divisible by its 7 heads"),
    ],
)
def test_mistakes_are_reported_in_one_line(script, arguments, message):
    ended = script("tools/benchmark.py", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("error: ")
    assert message in ended.err
