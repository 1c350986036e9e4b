"""Mistakes on a command line, and the help of all scripts."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from dit_video.core.command_line import ArgumentParser, check_minimum, parse_arguments, parse_memory
from dit_video.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for name in ("experiments", "tools")
    for path in (ROOT / name).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)
CONFIG = str(ROOT / "tests" / "support" / "tiny.py")


@dataclass(frozen=True)
class Options:
    """Options of a script."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    to: Literal["diffusers", "authors"]
    steps: int | None = None
    size: str = "17x32x48"
    interval: tuple[float, float] | None = None
    cache: bool = True


def message_of(*arguments):
    with pytest.raises(UserError) as error:
        parse_arguments(Options, args=arguments)
    return str(error.value)


def test_options_are_parsed():
    parsed = parse_arguments(Options, args=["runs/a", "--to", "authors", "--interval", "0.2", "0.8", "--no-cache"])
    assert parsed == Options(Path("runs/a"), to="authors", interval=(0.2, 0.8), cache=False)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["a", "--to", "authors", "--sise", "5"], ["--sise", "Use --size."]),
        (["a", "--to", "authors", "--no-cash"], ["--no-cash", "Use --no-cache."]),
        (["a", "--too", "authors"], ["--too", "Use --to."]),  # and --to is missing
        (["--nonsense", "a", "--to", "authors"], ["--nonsense", "Use --help"]),
        (["a", "b", "--to", "authors"], ["b is invalid", "Use --help"]),
        (["a", "--to", "authors", "--steps", "abc"], ["--steps abc", "a whole number", "Use --steps INT."]),
        (["a", "--to", "authors", "--steps=2.5"], ["--steps 2.5", "a whole number", "Use --steps INT."]),
        (["a", "--to", "authors", "--steps"], ["--steps is invalid", "Use --steps INT."]),
        (["a", "--to", "authors", "--interval", "0.2", "b"], ["--interval 0.2 b", "2 values", "FLOAT FLOAT."]),
        (["a", "--to", "author"], ["--to author", "diffusers, authors", "Use --to authors."]),
        (["a"], ["--to is missing", "Use --to {diffusers,authors}"]),
        ([], ["RUN and --to are missing"]),
    ],
)
def test_a_mistake_is_one_line_with_the_option_the_value_and_the_fix(arguments, parts):
    message = message_of(*arguments)
    assert "\n" not in message
    assert not [part for part in parts if part not in message], message


def test_names_of_nested_options_are_suggested():
    @dataclass(frozen=True)
    class Training:
        steps: int = 1

    @dataclass(frozen=True)
    class Experiment:
        denoiser: Training = Training()
        autoencoder: Training = Training()

    for option in ("--steps", "--stesp"):
        with pytest.raises(UserError, match=f"{option} is invalid.*Use .*--denoiser.steps"):
            parse_arguments(Experiment, args=[option, "3"])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["a", "--of", "sampler", "--stesp", "4"], ["--stesp", "Use --steps."]),
        (["a", "--of", "sampler", "--step", "4"], ["--step is invalid", "Use --steps."]),  # no abbreviations
        (["a", "--of", "sampler", "--steps", "abc"], ["--steps abc", "a whole number", "Use --steps INT."]),
        (["a", "--of", "sampler", "--steps"], ["--steps is invalid", "needs one argument"]),
        (["a", "--of", "sampling"], ["--of sampling", "denoiser, sampler", "Use --of sampler."]),
        (["a", "b", "--of", "sampler"], ["b is invalid", "Use --help"]),
        ([], ["config and --of are missing"]),
        (["a", "--off", "sampler"], ["--off", "Use --of."]),  # and --of is missing
    ],
)
def test_the_parser_without_tyro_words_them_alike(arguments, parts):
    parser = ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--of", choices=("denoiser", "sampler"), required=True)
    with pytest.raises(UserError) as error:
        parser.parse_args(arguments)
    assert not [part for part in parts if part not in str(error.value)], error.value


def test_numbers_below_their_minimum():
    check_minimum(1, steps=1, batch=None)
    with pytest.raises(UserError, match=r"--log-every 0 is invalid: .* at least 1\. Use --log-every 1"):
        check_minimum(1, steps=3, log_every=0)
    with pytest.raises(UserError, match="--price nan"):
        check_minimum(0, price=float("nan"))


# The scripts


def with_config(path, *arguments):
    """Return arguments of a script, after the config that training takes first."""
    return [CONFIG, *arguments] if path == "experiments/train.py" else list(arguments)


def assert_one_line(ended, *parts):
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert re.fullmatch(r"error: [^\n]*\n", ended.err), ended.err
    assert not [part for part in parts if part not in ended.err], ended.err


@pytest.mark.parametrize("path", SCRIPTS)
def test_an_unknown_option_of_each_script(script, path):
    option = "--wrokers" if path == "tools/ingest.py" else "--sste" if path.startswith("tools/") else "--sede"
    assert_one_line(script(path, *with_config(path, option, "5")), option, "Use --")


@pytest.mark.parametrize(
    ("path", "arguments", "value"),
    [
        ("experiments/distill.py", ["TEACHER"], "--clips abc"),
        ("experiments/distill.py", ["TEACHER"], "--clips 0"),
        ("experiments/distill.py", ["TEACHER"], "--steps 0"),
        ("experiments/evaluate.py", ["RUN"], "--steps abc"),
        ("experiments/evaluate.py", ["RUN"], "--steps 0"),
        ("experiments/finetune.py", ["MODEL", "--data", "CLIPS"], "--train all"),
        ("experiments/finetune.py", ["MODEL", "--data", "CLIPS"], "--steps 0"),
        ("experiments/quickstart.py", [], "--seed abc"),
        ("experiments/quickstart.py", [], "--seed -1"),
        ("experiments/sample.py", ["RUN", "--out", "a.gif", "--prompt", "red"], "--size abc"),
        ("experiments/sample.py", ["RUN", "--out", "a.gif", "--prompt", "red"], "--steps abc"),
        ("experiments/sample.py", ["RUN", "--out", "a.gif", "--prompt", "red"], "--steps 0"),
        ("experiments/train.py", [CONFIG, "--data", "CLIPS"], "--denoiser.steps abc"),
        ("experiments/train.py", [CONFIG, "--data", "CLIPS"], "--denoiser.batch abc"),
        ("tools/benchmark.py", [], "--steps abc"),
        ("tools/benchmark.py", [], "--steps 0"),
        ("tools/contact_sheet.py", ["SAMPLES", "a.gif"], "--columns abc"),
        ("tools/contact_sheet.py", ["SAMPLES", "a.gif"], "--columns 0"),
        ("tools/convert.py", ["SOURCE", "DESTINATION"], "--to onnx"),
        ("tools/encode_latents.py", ["RUN", "DATA", "DESTINATION"], "--storage float16"),
        ("tools/encode_latents.py", ["RUN", "DATA", "DESTINATION"], "--shards 0"),
        ("tools/export.py", ["RUN", "DESTINATION"], "--dtype int8"),
        ("tools/fit_preview_decoder.py", ["PIPELINE", "--data", "DATA"], "--clips 0"),
        ("tools/ingest.py", ["SOURCE", "DESTINATION"], "--workers abc"),
        ("tools/ingest.py", ["SOURCE", "DESTINATION"], "--workers 0"),
        ("tools/plan.py", [CONFIG, "--topology", "v5e:2x2"], "--of all"),
        ("tools/plan.py", [CONFIG, "--topology", "v5e:2x2"], "--steps 0"),
    ],
)
def test_a_wrong_value_of_each_script(script, path, arguments, value):
    option, _ = value.split()
    assert_one_line(script(path, *arguments, *value.split()), f"{value} is invalid", f"Use {option}")


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_begins_with_what_a_script_does_and_examples(script, path):
    ended = script(path, "--help")
    assert ended.code == 0, ended.err
    text = re.sub(r"\Ausage: .*?\n\n", "", ended.out, flags=re.DOTALL)
    assert re.match(r"[A-Z].*\.\n", text), text[:300]
    examples = [line for line in text.splitlines() if re.match(r" +python (experiments|tools)/\w+\.py", line)]
    assert len(examples) >= 2
    assert all(f"python {path}" in line for line in examples)


def test_the_help_of_a_config_names_every_option(script):
    ended = script("experiments/train.py", CONFIG, "--help")
    assert ended.code == 0, ended.err
    assert "positional arguments" not in ended.out
    assert "--sampling.guidance FLOAT [FLOAT]" in ended.out


def test_guidance_is_one_scale_or_two(load_file):
    experiment = load_file(Path(CONFIG)).EXPERIMENT
    registry = load_file(ROOT / "experiments" / "train.py").make_registry(experiment)
    for texts, expected in ((["3"], 3.0), (["4", "3"], (4.0, 3.0)), ([], experiment.sampling.guidance)):
        parsed = parse_arguments(
            type(experiment.sampling),
            args=["--guidance", *texts] if texts else [],
            default=experiment.sampling,
            config=(tyro.conf.AvoidSubcommands,),
            registry=registry,
        )
        assert parsed.guidance == expected


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * 2**30), ("1.5 gib", 3 * 2**29), ("80GB", 80 * 10**9), ("512MiB", 2**29)]
)
def test_sizes_of_memory_are_parsed(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "0GiB", "24 giraffes", "", "1e3GiB"])
def test_sizes_without_a_number_or_a_unit_are_refused(text):
    message = r"is invalid: it must be a positive number with one of .* Use a size such as 24GiB"
    with pytest.raises(UserError, match=message):
        parse_memory(text)
