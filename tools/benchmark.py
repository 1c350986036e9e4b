"""Measure the speed of training, sampling and data loading on this machine; print JSON to stdout, progress to stderr.

    python tools/benchmark.py                                    # the default parts, with the quickstart's models
    python tools/benchmark.py denoiser autoencoder               # some parts
    python tools/benchmark.py attention --tokens 8192 --peers    # packed rows against dense attention, including torch
    python tools/benchmark.py model --peers                      # a transformer against diffusers', same weights
    python tools/benchmark.py model --peers --explain            # with other instructions, libraries and threads, too
    python tools/benchmark.py train --steps 100                  # overhead of the loop, saving and restarting
    python tools/benchmark.py sampling                           # steps and guidance against forward passes
    python tools/benchmark.py tiling --run RUN --clips CLIPS     # errors of tiled decoding
    python tools/benchmark.py latent_storage --run RUN           # quality of latents in 32, 16 and 8 bits
    python tools/benchmark.py data --clips CLIPS                 # your own clips instead of rendered ones
    python tools/benchmark.py --config experiments/configs/clips.py --steps 50
    python tools/benchmark.py autoencoder --peers                # against diffusers, if it and torch are installed
    python tools/benchmark.py denoiser --set model.backbone.width=1024 --set model.backbone.heads=16

The default parts are:

    denoiser, autoencoder    training steps on random latents and pixels of mixed sizes, packed as in training
    data                     the loaders feeding those steps (cached latents; video files; video files encoded on the
                             fly, as rows and in buckets), decoding against a bare PyAV loop, ingest with two processes
                             against one, and the loader's memory

The other parts run only if they are named:

    attention    attention that skips blocks of other segments, against dense attention
    latent_storage  bytes of a clip's latents, their error, and PSNR of the decoded clip, by the type of storage
    tiling       largest and mean error of tiled decoding, in steps of 0..255, for several overlaps of the tiles
    model        a forward pass and a training step of a transformer like Wan's, and, without peers, compile time by
                 depth
    train        overhead of the training loop and of background saves; time to the first step of a new run and of one
                 that was killed
    sampling     N steps against N forward passes, guidance in one pass against two, programs compiled for other
                 prompts and settings, and time to the first clip with and without kept programs
    scale        seconds and memory from a table of a million clips (`--rows`) to its batches, and at an epoch's edge
    shots        F1 of the detectors of cuts, dissolves and fades on rendered videos, `--examples` / 10 of them
    duplicates   recall and precision of near-duplicates among rendered clips, by a CLIP that is trained on scenes
    ingest       hours of 480p video a day that ingest stores, by stream copy and encoded again, with two processes
    studio       time until the studio's page is there, and from a click to a playing video, in headless Chromium

`--small` runs `model` and `sampling` on tiny models. `--peers` also times the convolutional autoencoder and the
transformer of diffusers on the same weights, and torch's attention; `--explain` compares the transformers in five
processes for each of five settings of CPUs, which takes an hour. Parts whose packages are missing are skipped and
marked in the output; `denoiser` and `autoencoder` need only JAX, Flax and optax. If the quickstart's config cannot be
imported for that reason, models of about its size are measured and `setting` is `built in`.
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parent))

import dit_video
from benchmarks import sampler
from benchmarks.settings import Setting, resolve_setting
from benchmarks.steps import TrainingSetup, measure_autoencoder, measure_denoiser
from dit_video.core.command_line import ArgumentParser, check_minimum
from dit_video.core.errors import MissingError, UserError, script

DEFAULT_PARTS = ("denoiser", "autoencoder", "data")
OPTIONAL_PARTS = (
    *(
        "attention",
        "tiling",
        "model",
        "train",
        "sampling",
        "features",
        "studio",
        "scale",
        "latent_storage",
        "duplicates",
        "shots",
    ),
    "ingest",
)
"""Parts that run only if they are named."""
PRETRAINED = Path(__file__).resolve().parents[1] / "experiments" / "pretrained" / "shapes"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSize:
    """Size of the benchmarks.

    Raises:
      UserError: If a number is below 1.
    """

    steps: int
    """Number of timed steps of each model."""
    examples: int
    """Number of examples in the data set of latents."""
    rounds: int
    """Number of rounds of interleaved comparisons."""
    batches: int
    """Number of batches over which the loader's memory is measured."""
    tokens: int
    """Number of tokens in the rows of the attention benchmark."""
    rows: int
    """Number of clips in the table of the scale benchmark."""
    small: bool
    """True for tiny models in `model` and `sampling`."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "small":
                check_minimum(1, **{name: value})


def describe_machine() -> dict[str, Any]:
    """Return a description of the machine and the software."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "dit_video": dit_video.__version__,
    }


def run_benchmarks(
    setting: Setting,
    parts: Sequence[str],
    size: BenchmarkSize,
    clips: Path | None,
    *,
    run: Path,
    peers: bool,
    explain: int | None,
    setting_arguments: Sequence[str],
) -> dict[str, Any]:
    """Run the parts and return the whole document.

    Args:
      setting: Models and data.
      parts: Names of the parts.
      size: Size of the benchmarks.
      clips: Folder of clips; None for rendered ones.
      run: Run or pipeline of the parts that need one.
      peers: Whether other projects' models are timed, too.
      explain: Number of processes for each setting of CPUs in which `model` is timed; None if it is not.
      setting_arguments: Arguments of the command line that select the setting.
    """
    document: dict[str, Any] = {"machine": describe_machine(), "setting": setting.name}
    denoiser = autoencoder = None
    if "denoiser" in parts or "data" in parts:
        print("timing the denoiser's step", file=sys.stderr)
        document["denoiser"], denoiser = measure_denoiser(setting, size.steps, size.examples)
    if "autoencoder" in parts or "data" in parts:
        print("timing the autoencoder's step", file=sys.stderr)
        document["autoencoder"], autoencoder = measure_autoencoder(setting, size.steps)
    if "attention" in parts:
        print("timing attention over packed rows", file=sys.stderr)
        document["attention"] = measure_attention(size, peers=peers)
    if "model" in parts:
        print("timing a transformer like Wan's", file=sys.stderr)
        document["model"] = measure_model(size, peers=peers, explain=explain)
    if "train" in parts:
        print("timing the training loop", file=sys.stderr)
        document["train"] = measure_loop(setting, size, setting_arguments)
    if "sampling" in parts:
        print("timing sampling", file=sys.stderr)
        document["sampling"] = measure_sampling(size, run)
    if "features" in parts:
        document["features"] = measure_features(size)
    if "scale" in parts:
        document["scale"] = measure_optional("scale", size.rows)
    if "duplicates" in parts:
        document["duplicates"] = measure_duplicates()
    if "studio" in parts:
        print("timing the studio in headless Chromium", file=sys.stderr)
        document["studio"] = measure_optional("studio", run)
    if "shots" in parts:
        document["shots"] = measure_shots(size)
    if "ingest" in parts:
        document["ingest"] = measure_optional("ingest", 2 if size.small else 12)
    if "tiling" in parts:
        print("measuring errors of tiled decoding", file=sys.stderr)
        document["tiling"] = measure_optional("tiling", run, clips)
    if "latent_storage" in parts:
        document["latent_storage"] = measure_optional("latent_storage", run, clips)
    if denoiser is not None and autoencoder is not None and "data" in parts:
        document["data"] = measure_data(setting, denoiser, autoencoder, size, clips)
        if "latents" in document["data"]:
            # One program must serve all sizes, prompts and steps, with rows from memory and from the loader.
            both = document["denoiser"]["compilations"] + document["data"]["latents"]["compilations"]
            document["packed_step_compilations"] = both
    if peers and autoencoder is not None:
        document["autoencoder"]["peers"] = measure_peers(size.rounds)
    return document


def measure_optional(part: str, *arguments: Any) -> dict[str, Any]:
    """Return the figures of `benchmarks.PART`, whose packages may be missing."""
    try:
        module = importlib.import_module(f"benchmarks.{part}")
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    return module.measure(*arguments)


def measure_loop(setting: Setting, size: BenchmarkSize, setting_arguments: Sequence[str]) -> dict[str, Any]:
    """Measure the overhead of the training loop."""
    try:
        from benchmarks import train_loop
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    return train_loop.measure(setting, size.steps, size.examples, size.rounds, setting_arguments)


def measure_peers(rounds: int) -> dict[str, Any]:
    """Measure other projects' autoencoders on the same weights."""
    try:
        from benchmarks import peers
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    print("timing autoencoders against diffusers'", file=sys.stderr)
    return {"AutoencoderKLWan": peers.measure_against_diffusers(rounds)}


def measure_attention(size: BenchmarkSize, *, peers: bool) -> dict[str, Any]:
    """Measure our attention against dense ones, with `peers` including torch's."""
    from benchmarks import attention

    if not peers:
        return attention.measure(size.tokens, size.rounds)
    try:
        from benchmarks.peers import make_torch_attention
    except ModuleNotFoundError as error:
        figures = attention.measure(size.tokens, size.rounds)
        return figures | {"peers": {"skipped": f"{error.name} is not installed"}}
    return attention.measure(size.tokens, size.rounds, make_torch_attention)


def measure_model(size: BenchmarkSize, *, peers: bool, explain: int | None) -> dict[str, Any]:
    """Measure a forward pass and a training step, with `peers` against diffusers', else also compile time by depth."""
    try:
        from benchmarks import model
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    shape = model.SMALL if size.small else model.WanShape()
    if not peers:
        return model.measure(shape, size.rounds) | {"compilation": model.measure_compilation(shape)}
    try:
        from benchmarks.wan_peer import make_peer_functions
    except ModuleNotFoundError as error:
        return model.measure(shape, size.rounds) | {"peers": f"{error.name} is not installed"}
    figures = model.measure(shape, size.rounds, make_peer_functions)
    if explain is not None:
        from benchmarks.explain import measure

        options = ["--rounds", str(size.rounds), *(["--small"] if size.small else [])]
        figures["explained"] = measure(explain, options)
    return figures


def measure_sampling(size: BenchmarkSize, run: Path) -> dict[str, Any]:
    """Measure steps and guidance against forward passes for two sizes of model, and the time to the first clip."""
    shapes = {"small": sampler.SMALL}
    if not size.small:
        shapes = {"quickstart": sampler.QUICKSTART, "larger": sampler.SamplingShape()}
    figures = {name: sampler.measure(shape, size.rounds) for name, shape in shapes.items()}
    return figures | ({} if size.small else {"first result": sampler.measure_first_result(run)})


def measure_features(size: BenchmarkSize) -> dict[str, Any]:
    """Measure the feature networks of metrics against PyTorch."""
    try:
        from benchmarks import feature_networks
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    return (
        feature_networks.measure(size.rounds, clips=1, images=2)
        if size.small
        else feature_networks.measure(size.rounds)
    )


def measure_duplicates() -> dict[str, Any]:
    """Measure recall and precision of near-duplicates on rendered clips, by a CLIP that is trained on such clips."""
    from benchmarks import duplicates

    print("training a CLIP of rendered scenes", file=sys.stderr)
    return duplicates.measure_trained()


def measure_shots(size: BenchmarkSize) -> dict[str, Any]:
    """Measure the detectors of transitions on rendered videos."""
    try:
        from benchmarks import shots
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    print("detecting transitions in rendered videos", file=sys.stderr)
    return shots.measure(4 if size.small else max(1, size.examples // 10))


def measure_data(
    setting: Setting, denoiser: TrainingSetup, autoencoder: TrainingSetup, size: BenchmarkSize, clips: Path | None
) -> dict[str, Any]:
    """Measure everything that needs the packages for reading clips."""
    try:
        from benchmarks import data, online_training
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    print("timing an epoch of the loader", file=sys.stderr)
    figures, denoiser = data.measure_latents(setting, denoiser, size.examples)
    document: dict[str, Any] = {"latents": figures}
    print("measuring the loader's memory", file=sys.stderr)
    document["memory"] = data.measure_memory(setting, size.examples, size.batches)
    with data.provide_clips(clips, 48) as folder:
        print("timing training from video files", file=sys.stderr)
        document["videos"] = data.measure_videos(setting, autoencoder, folder, size.steps)
        document["live"] = online_training.measure_online(setting, denoiser, folder, size.steps)
        print("timing decoding", file=sys.stderr)
        document["decoding"] = data.measure_decoding(setting, folder, size.rounds)
        print("timing ingest", file=sys.stderr)
        document["ingest"] = data.measure_ingest(folder, size.rounds)
    return document


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"Parts to run: {', '.join(DEFAULT_PARTS)} (the default), or {', '.join(OPTIONAL_PARTS)}.",
    )
    parser.add_argument("--config", type=Path, help="Config file of the models; the quickstart's by default.")
    parser.add_argument("--clips", type=Path, help="Folder of clips; rendered ones by default.")
    parser.add_argument("--steps", type=int, default=20, help="Number of timed steps of each model.")
    parser.add_argument("--examples", type=int, default=400, help="Number of clips in the data set of latents.")
    parser.add_argument("--rounds", type=int, default=3, help="Number of rounds of interleaved comparisons.")
    parser.add_argument(
        "--batches", type=int, default=10_000, help="Number of batches over which the loader's memory is measured."
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, help="Number of tokens in the rows of the attention benchmark."
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="Number of clips of the `scale` benchmark.")
    parser.add_argument("--small", action="store_true", help="Use tiny models for `model` and `sampling`.")
    parser.add_argument(
        "--run", type=Path, default=PRETRAINED, help="Run or pipeline of `tiling`, `latent_storage` and `sampling`."
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="Change a field of the config; repeatable."
    )
    parser.add_argument("--peers", action="store_true", help="Also time other projects' models.")
    parser.add_argument(
        "--explain",
        type=int,
        nargs="?",
        const=5,
        metavar="RUNS",
        help="Also time `model --peers` in so many processes (5) for each of several settings of CPUs.",
    )
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in DEFAULT_PARTS + OPTIONAL_PARTS]:
        raise UserError(
            f"part {unknown[0]!r} is invalid: it does not exist. Use {', '.join(DEFAULT_PARTS + OPTIONAL_PARTS)}."
        )
    if arguments.explain is not None:
        check_minimum(1, explain=arguments.explain)
        if not (arguments.peers and "model" in arguments.parts):
            raise UserError("--explain compares the model with its peer: use `model --peers --explain`.")
    size = BenchmarkSize(**{field.name: getattr(arguments, field.name) for field in fields(BenchmarkSize)})
    if arguments.clips is not None and not arguments.clips.is_dir():
        raise MissingError(
            f"--clips {arguments.clips} is not a folder; use a folder of clips, or drop --clips for rendered ones"
        )
    setting = resolve_setting(arguments.config, arguments.set)
    setting_arguments = [] if arguments.config is None else ["--config", str(arguments.config)]
    setting_arguments += [part for assignment in arguments.set for part in ("--set", assignment)]
    document = run_benchmarks(
        setting,
        arguments.parts or DEFAULT_PARTS,
        size,
        arguments.clips,
        run=arguments.run,
        peers=arguments.peers,
        explain=arguments.explain,
        setting_arguments=setting_arguments,
    )
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    script(main, is_resumable=False)()
