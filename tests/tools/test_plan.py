"""The command that plans a run, as a user starts it."""

import json
from dataclasses import replace

import pytest

from support.tiny_wan import DIT, write_wan
from support.wan_folders import write_published_folder

TOOL, CONFIG = "tools/plan.py", "tests/support/tiny.py"
RING = ("--set", "parallel.context_attention='ring'", "--set", "model.backbone.attention=dense")


def test_the_command_prints_a_plan_and_writes_its_document(tmp_path, script):
    target = tmp_path / "plan.json"
    more = ("--rows", 8, "--parallel", "fsdp=2", "--steps", 100, "--price", 3, "--json", target)
    done = script(TOOL, CONFIG, "--topology", "h200:8", *more)
    assert done.code == 0, done.err
    assert "tiny: denoiser" in done.out
    assert "analytic" in done.out
    document = json.loads(target.read_text())
    assert document["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    assert (document["steps"], document["price"]) == (100, 3.0)
    assert document["memory"]["peak"] <= document["limit"]


def test_the_command_searches_for_a_mesh_that_fits(script):
    done = script(TOOL, CONFIG, "--topology", "h100:4", "--suggest", "--tries", 2, "--set", "model.backbone.layers=2")
    assert done.code == 0, done.err
    assert len([line for line in done.err.splitlines() if "counted" in line]) == 2
    assert "fits" in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tests/experiments/none.py", "--topology", "h100:8"), "none.py does not exist; use"),
        ((CONFIG, "--topology", "v9:8"), "Use one of v4, v5e, v5p, v6e, v7x, a100, h100, h200, b200"),
        ((CONFIG, "--topology", "v5e:4x4x4"), "Use a shape such as v5e:4x4"),
        ((CONFIG, "--topology", "h100:8", "--parallel", "fsdp=3"), "fsdp=3 does not divide the 8 devices"),
        ((CONFIG, "--topology", "h100:8", "--parallel", "pipeline=2"), "pipeline=2 is invalid: it must be AXIS=SIZE"),
        (
            (CONFIG, "--topology", "h100:2", *RING, "--parallel", "context=2"),
            "ring attention computes its own blocks",
        ),
        ((CONFIG, "--topology", "h100:8", "--steps", "0"), "at least 1"),
        ((CONFIG, "--topology", "h100:8", "--suggest", "--parallel", "fsdp=2"), "drop one of them"),
        ((CONFIG, "--topology", "h100:8", "--suggest", "--fit", "24GiB"), "drop one of them"),
        ((CONFIG, "--topology", "h100:8", "--fit", "24"), "'24' is invalid: it must be a positive number with one of"),
        ((CONFIG, "--topology", "h100:8", "--fit", "200GiB"), "a device of h100:8 has 67.06 GiB. Use 68664MiB or less"),
        ((CONFIG, "--topology", "v5e:4x4*two"), "Use, for two slices, v5e:4x4*2"),
        ((CONFIG, "--topology", "h100:8*2"), "Use their number, such as h100:8"),
        (
            (CONFIG, "--topology", "cpu:1", "--calibration", "nowhere"),
            "no measurement. Use --calibrate first",
        ),
        (
            (CONFIG, "--topology", "b200:8", "--price", "-1"),
            "must be at least 0. Use --price 0",
        ),
        ((CONFIG,), "--topology is missing"),
        (("--topology", "h100:8"), "CONFIG is missing"),
        (
            ("tests/support", "--topology", "h100:8"),
            "invalid for a folder, whose sampling is planned; use --of sampler",
        ),
        (
            ("tests/support", "--topology", "h100:8", "--of", "sampler", "--rows", "2", "--set", "x=1"),
            "--rows --set is invalid for a folder, for which one request is planned. Leave it out",
        ),
        (
            (CONFIG, "--topology", "h100:8", "--offload", "layers"),
            "--offload is invalid for a config, whose fields are set by --set",
        ),
        ((CONFIG, "--topology", "h100:8", "--set", "model.backbone.depth=2"), "'depth' does not exist; use one of"),
    ],
)
def test_the_command_refuses_wrong_arguments(script, arguments, says):
    refused = script(TOOL, *arguments)
    assert refused.code == 2
    assert says in " ".join(refused.err.split())


def test_the_command_says_what_makes_a_step_fit(tmp_path, script):
    target = tmp_path / "fit.json"
    more = ("--rows", 8, "--of", "sampler", "--fit", "0.29MiB", "--json", target)
    done = script(TOOL, CONFIG, "--topology", "h100:4", *more)
    assert done.code == 0, done.err
    assert "does not fit as configured" in done.out
    assert "--set sampling.branch_evaluation=apart" in done.out
    document = json.loads(target.read_text())
    assert document["configured"]["memory"] > document["limit"]
    assert all(each["memory"] <= document["limit"] for each in document["fitting"])
    assert document["fitting"]


def test_plans_for_chips_without_a_price_name_the_option_that_sets_it(script):
    done = script(TOOL, CONFIG, "--topology", "b200:8", "--rows", 8)
    assert done.code == 0, done.err
    assert "no public price of b200 is known: set one with --price" in done.out
    assert "$" not in done.out
    assert "chip-hours" in done.out


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_the_command_measures_this_machine_and_plans_for_it(tmp_path, script):
    """A plan for a CPU expects the speeds that were measured, and another machine's folder has none."""
    measured = script(TOOL, "--calibrate", "--calibration", tmp_path)
    assert measured.code == 0, measured.err
    assert "of the peak" in measured.err
    assert (tmp_path / "cpu.json").is_file()
    target = tmp_path / "plan.json"
    done = script(TOOL, CONFIG, "--topology", "cpu:1", "--calibration", tmp_path, "--json", target)
    assert done.code == 0, done.err
    assert "compiled in" in done.out
    assert "products at" in done.out
    document = json.loads(target.read_text())
    assert document["expected"]["seconds"] >= document["overlapped"]["seconds"] > 0
    stored = json.loads((tmp_path / "cpu.json").read_text())["efficiencies"]
    assert document["efficiencies"]["products"] == stored["products"]


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_the_command_fits_a_training_and_a_sampler_on_an_absent_tpu(tmp_path, script):
    """The memory of the combinations that are listed first is that of compiled steps."""
    pytest.importorskip("libtpu")
    target = tmp_path / "fit.json"
    config = tmp_path / "config.py"
    config.write_text(
        "import runpy\n"
        "from dit_video.training.optim.optimizer import AdamW\n"
        f'TINY = runpy.run_path({CONFIG!r})["EXPERIMENT"]\n'
        'EXPERIMENT = TINY.replace_stage("denoiser", optimizer=AdamW(schedule=TINY.denoiser.optimizer.schedule))\n'
    )
    model = ("--set", "model.backbone.width=256", "--set", "model.backbone.attention='splash'", "--rows", 64)
    more = (*model, "--tries", 1, "--json", target)
    for part, size in (("denoiser", "40MiB"), ("sampler", "14MiB")):
        done = script(TOOL, config, "--topology", "v5e:2x2", *more, "--of", part, "--fit", size)
        assert done.code == 0, done.err
        document = json.loads(target.read_text())
        compiled = [each for each in document["fitting"] + document["overflowing"] if each["method"] == "compiled"]
        assert compiled, done.out
        assert all(each["memory"] <= document["limit"] for each in document["fitting"])
        assert all(each["memory"] > document["limit"] for each in document["overflowing"])
    nothing = script(TOOL, CONFIG, "--topology", "v5e:2x2", *more, "--fit", "64KiB")
    assert nothing.code == 0, nothing.err
    assert "nothing fits: the least of" in nothing.out


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.nightly
def test_a_plan_for_a_tpu_without_a_price_works(script):
    pytest.importorskip("libtpu")
    done = script(TOOL, CONFIG, "--topology", "v7x:2x2x1", "--rows", 8)
    assert done.code == 0, done.err
    assert "no public price of v7x is known: set one with --price" in done.out
    assert "nothing is expected: no speed of products" in done.out


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.nightly  # the search compiles for one, too
def test_the_command_compiles_for_an_absent_tpu(tmp_path, script):
    pytest.importorskip("libtpu")
    target = tmp_path / "plan.json"
    model = ("--set", "model.backbone.width=256", "--set", "model.backbone.attention='splash'", "--rows", 4)
    more = (*model, "--set", "model.backbone.remat='full'", "--json", target, "--parallel", "fsdp=4")
    done = script(TOOL, CONFIG, "--topology", "v5e:2x2", *more)
    assert done.code == 0, done.err
    assert "compiled in" in done.out
    document = json.loads(target.read_text())
    assert document["fits"]
    # The difference is large, because rows are as short as the smallest block of the kernel.
    assert document["model_flops"] < document["executed_flops"]
    assert any(part["axes"] == ["fsdp"] for part in document["moved"])
    huge = script(TOOL, CONFIG, "--topology", "v5e:2x2", *more, "--rows", 2**20)
    assert huge.code == 0, huge.err
    assert "does not fit" in huge.out
    document = json.loads(target.read_text())
    assert not document["fits"]
    assert document["memory"]["peak"] > document["limit"]


@pytest.mark.usefixtures("optimized_compilation")
@pytest.mark.slow
def test_the_sampling_of_a_folder_is_planned(tmp_path, script):
    write_wan(tmp_path / "wan", backbone=replace(DIT, width=128, mlp_dim=256))
    options = ("--topology", "v5p:2x2x1", "--of", "sampler", "--size", "5x16x16", "--offload", "stages")
    done = script(TOOL, tmp_path / "wan", *options, "--json", tmp_path / "plan.json")
    assert done.code == 0, done.err
    assert "fits: " in done.out
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [stage["name"] for stage in document["stages"]] == ["text", "sampling", "decoding"]
    assert (document["size"], document["offload"]) == ([5, 16, 16], "Stages()")
    fitted = script(TOOL, tmp_path / "wan", *options[:-2], "--fit", "2GB", "--json", tmp_path / "fit.json")
    assert fitted.code == 0, fitted.err
    document = json.loads((tmp_path / "fit.json").read_text())
    assert (document["limit"], document["offload"]) == (2 * 10**9, "None")


def test_the_fine_tuning_of_a_folder_is_planned_from_its_json_files(tmp_path, script):
    write_published_folder(tmp_path / "wan", "Wan2.1-T2V-14B-Diffusers")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    options = ("--topology", "h100:1", "--train", "lora", "--size", "33x480x832", "--json", tmp_path / "plan.json")
    done = script(TOOL, tmp_path / "wan", *options)
    assert done.code == 0, done.err
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["fits"]
    assert document["clips"] == [9 * 30 * 52]
    assert 28e9 < document["memory"]["other"] < 30e9  # 14 billion weights in bfloat16
    refused = script(TOOL, tmp_path / "wan", *options, "--offload", "layers")
    assert "--offload is invalid for a training" in refused.err
