"""Mistakes on a command line, and the help of all scripts."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from dit_video.core.command_line import ArgumentParser, check_minimum, parse_arguments, parse_memory
from dit_video.core.errors import UserError
from dit_video.diffusion import Guidance

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


def test_options_are_parsed():
    parsed = parse_arguments(Options, args=["runs/a", "--to", "authors", "--interval", "0.2", "0.8", "--no-cache"])
    assert parsed == Options(Path("runs/a"), to="authors", interval=(0.2, 0.8), cache=False)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["a", "--to", "authors", "--sise", "5"], ["--sise", "--size STR"]),
        (["a", "--too", "authors"], ["--too", "--to {diffusers,authors}"]),
        (["a", "--nonsense", "--to", "authors"], ["--nonsense"]),
        (["a", "b", "--to", "authors"], ["b"]),
        (["a", "--to", "authors", "--steps", "abc"], ["--steps", "abc", "INT"]),
        (["a", "--to", "authors", "--steps"], ["--steps"]),
        (["a", "--to", "authors", "--interval", "0.2", "b"], ["--interval", "'b'", "FLOAT FLOAT"]),
        (["a", "--to", "author"], ["author", "diffusers", "authors"]),
        (["a", "--to", "authors", "--size", "-a b"], ["given as --size='-a b'"]),
        (["a", "--to", "authors", "--size", "--steps 5 c"], ["given as --size='--steps 5 c'"]),
        ([], ["RUN", "--to {diffusers,authors}"]),
    ],
)
def test_a_mistake_is_one_line_with_the_option_and_what_is_valid(arguments, parts, capfd):
    with pytest.raises(UserError) as error:
        parse_arguments(Options, args=arguments)
    message = str(error.value)
    assert re.fullmatch("[^\n│╭╰─]*--help", message), message
    assert not [part for part in parts if part not in message], message
    assert capfd.readouterr() == ("", "")


def test_a_function_is_called_with_its_options_and_writes_to_stderr(capfd):
    def main(steps: int) -> int:
        """Run a script."""
        print("progress", file=sys.stderr)
        raise SystemExit(steps)

    with pytest.raises(SystemExit, match="7"):
        parse_arguments(main, args=["--steps", "7"])
    assert capfd.readouterr().err == "progress\n"


def test_names_of_nested_options_are_suggested():
    @dataclass(frozen=True)
    class Training:
        steps: int = 1

    @dataclass(frozen=True)
    class Experiment:
        denoiser: Training = Training()
        autoencoder: Training = Training()

    with pytest.raises(UserError, match=r"--steps.*--autoencoder.steps.*--denoiser.steps"):
        parse_arguments(Experiment, args=["--steps", "3"])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["a", "--of", "sampler", "--step", "4"], ["--step "]),  # no abbreviations
        (["a", "--of", "sampler", "--steps", "abc"], ["--steps", "abc"]),
        (["a", "--of", "sampling"], ["--of", "sampling", "denoiser", "sampler"]),
        ([], ["config", "--of"]),
    ],
)
def test_a_mistake_is_an_error_of_the_parser_without_tyro(arguments, parts):
    parser = ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--of", choices=("denoiser", "sampler"), required=True)
    with pytest.raises(UserError) as error:
        parser.parse_args(arguments)
    assert not [part for part in (*parts, "--help") if part not in str(error.value)], error.value


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
    assert_one_line(script(path, *with_config(path, "--sede", "5")), "--help")


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
    assert_one_line(script(path, *arguments, *value.split()), *value.split())


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
    assert "--sampling.guidance FLOAT [FLOAT] | NAME=FLOAT[,FLOAT]" in ended.out


def test_guidance_is_one_scale_or_two_or_has_names(load_file):
    experiment = load_file(Path(CONFIG)).EXPERIMENT
    registry = load_file(ROOT / "experiments" / "train.py").make_registry(experiment)
    own = experiment.sampling.guidance
    for texts, expected in (
        (["3"], {"text": 3.0}),
        (["4", "3"], {"text": (4.0, 3.0)}),
        (["text=4,3", "motion=2"], {"text": (4.0, 3.0), "motion": 2.0}),
        ([], own.scales),
    ):
        parsed = parse_arguments(
            type(experiment.sampling),
            args=["--guidance", *texts] if texts else [],
            default=experiment.sampling,
            config=(tyro.conf.AvoidSubcommands,),
            registry=registry,
        )
        assert parsed.guidance == Guidance(scales=expected)


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
