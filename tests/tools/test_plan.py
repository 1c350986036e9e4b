"""The command that plans a run, as a user starts it."""

import json

import pytest

TOOL, CONFIG = "tools/plan.py", "tests/support/tiny.py"


def test_the_command_prints_a_plan_and_writes_its_document(tmp_path, script):
    target = tmp_path / "plan.json"
    more = ("--rows", 8, "--mesh", "fsdp=2", "--steps", 100, "--price", 3, "--json", target)
    done = script(TOOL, CONFIG, "--topology", "h200:8", *more)
    assert done.code == 0, done.err
    assert "tiny: denoiser" in done.out
    assert "analytic" in done.out
    document = json.loads(target.read_text())
    assert document["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1, "context": 1}
    assert (document["steps"], document["price"]) == (100, 3.0)
    assert document["memory"]["peak"] <= document["limit"]


def test_the_command_searches_for_a_mesh_that_fits(script):
    done = script(
        TOOL, CONFIG, "--topology", "h100:4", "--suggest", "--tries", 2, "--set", "denoiser.backbone.layers=2"
    )
    assert done.code == 0, done.err
    assert len([line for line in done.err.splitlines() if "counted" in line]) == 2
    assert "fits" in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tests/experiments/none.py", "--topology", "h100:8"), "none.py does not exist; use"),
        ((CONFIG, "--topology", "v9:8"), "Use one of v4, v5e, v5p, v6e, v7x, a100, h100, h200, b200"),
        ((CONFIG, "--topology", "v5e:4x4x4"), "Use a shape such as v5e:4x4"),
        ((CONFIG, "--topology", "h100:8", "--mesh", "fsdp=3"), "fsdp=3 does not divide the 8 devices"),
        ((CONFIG, "--topology", "h100:8", "--mesh", "pipeline=2"), "pipeline=2 is invalid: it must be AXIS=SIZE"),
        ((CONFIG, "--topology", "h100:8", "--steps", "0"), "at least 1"),
        ((CONFIG, "--topology", "h100:8", "--suggest", "--mesh", "fsdp=2"), "drop one of them"),
        ((CONFIG, "--topology", "h100:8", "--set", "denoiser.backbone.depth=2"), "'depth' does not exist; use one of"),
    ],
)
def test_the_command_refuses_wrong_arguments(script, arguments, says):
    refused = script(TOOL, *arguments)
    assert refused.code == 2
    assert says in " ".join(refused.err.split())


@pytest.mark.slow
def test_the_command_compiles_for_an_absent_tpu(tmp_path, script):
    pytest.importorskip("libtpu")
    target = tmp_path / "plan.json"
    model = ("--set", "denoiser.backbone.width=256", "--set", "denoiser.backbone.attention='splash'", "--rows", 4)
    more = (*model, "--set", "denoiser.backbone.remat='full'", "--json", target, "--mesh", "fsdp=4")
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
