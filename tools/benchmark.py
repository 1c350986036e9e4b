"""How fast training is on this machine: one JSON document on stdout, progress on stderr.

    python tools/benchmark.py                                    # all parts, with the quickstart's models
    python tools/benchmark.py denoiser autoencoder               # some parts
    python tools/benchmark.py attention --tokens 8192 --peers    # packed rows beside dense attention, torch's too
    python tools/benchmark.py model --peers                      # a transformer beside diffusers' on the same weights
    python tools/benchmark.py mfu --attention tokamax            # model FLOPs utilisation, of a GPU
    python tools/benchmark.py train --steps 100                  # the loop beside its step, saving, starting again
    python tools/benchmark.py sampling                           # steps and guidance beside forward passes
    python tools/benchmark.py tiling --run RUN --clips CLIPS     # what tiles change of a trained autoencoder's frames
    python tools/benchmark.py data --clips CLIPS                 # with one's own clips instead of rendered ones
    python tools/benchmark.py --config experiments/configs/clips.py --steps 50
    python tools/benchmark.py autoencoder --peers                # beside diffusers, where that and torch are installed
    python tools/benchmark.py denoiser --set denoiser.dit.width=1024 --set denoiser.dit.heads=16

`denoiser` and `autoencoder` time training steps on random latents and pixels of mixed sizes, packed as in training.
`data` measures the loaders beside those steps (cached latents; video files; video files that are encoded on the way, as
rows and in buckets), decoding against a bare loop, ingest with two processes against one, and the loader's memory.
Six parts run where they are named: `attention` times attention that skips foreign blocks beside dense attention;
`tiling` says by how many steps of 0..255 frames decoded in blended tiles differ from whole ones, at the largest and in
the mean, for several overlaps; `model` times a forward pass and a training step of a transformer like Wan's, and how
compile time grows with its depth; `mfu` a training step of 1.6 billion parameters in bfloat16 on a row of 32k tokens,
as a share of what the device can do; `train` says what the training loop adds to its step, and a save in the
background to the steps between two saves, how long a run takes to its first step, and how long one that was killed;
`sampling` says what N steps cost beside N forward passes, what guidance in one pass beside two, how many programs
other prompts and settings compile, and how long a first clip takes with and without kept programs (`--small` tries
these three on little models). `--peers` times the convolutional autoencoder and the transformer beside diffusers' on
the same weights, and attention beside torch's. A part whose packages are missing is skipped, and the document says so:
`denoiser`, `autoencoder` and `mfu` need JAX, Flax and optax alone. Where the quickstart's config cannot be imported
for that reason, models of about its size are measured, and `setting` is `built in`.
"""

from dit_video.platform.huge_pages import use_huge_pages

use_huge_pages(__name__)

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import jax

sys.path.insert(0, str(Path(__file__).parent))

import dit_video
from benchmarks import mfu, sampling
from benchmarks.setting import Setting, chosen_setting
from benchmarks.steps import Trained, measure_autoencoder, measure_denoiser
from dit_video.core.errors import MissingError, UserError, script
from dit_video.nn import Backend

PARTS = ("denoiser", "autoencoder", "data")
BY_NAME = ("attention", "tiling", "model", "mfu", "train", "sampling")
"""parts that run where they are named alone"""
PRETRAINED = Path(__file__).resolve().parents[1] / "experiments" / "pretrained" / "shapes"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How long is measured.

    Raises:
      UserError: a number below 1.
    """

    steps: int
    """timed steps of each model"""
    examples: int
    """of the data set of latents"""
    rounds: int
    """of what is compared in turn"""
    batches: int
    """that the loader's memory is watched over"""
    tokens: int
    """of the rows that attention is timed on"""
    small: bool
    """little models, for `model`, `mfu` and `sampling`"""

    def __post_init__(self):
        for name, value in vars(self).items():
            if name != "small" and value < 1:
                raise UserError(f"--{name} {value} must be at least 1")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
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


def benchmark(
    setting: Setting,
    parts: Sequence[str],
    extent: Extent,
    clips: Path | None,
    *,
    run: Path,
    peers: bool,
    attention: Backend,
    peak: float | None,
    chosen: Sequence[str],
) -> dict[str, Any]:
    """The whole document; `chosen` are the arguments that say the setting."""
    document: dict[str, Any] = {"machine": machine(), "setting": setting.name}
    denoiser = autoencoder = None
    if "denoiser" in parts or "data" in parts:
        print("the denoiser's step", file=sys.stderr)
        document["denoiser"], denoiser = measure_denoiser(setting, extent.steps, extent.examples)
    if "autoencoder" in parts or "data" in parts:
        print("the autoencoder's step", file=sys.stderr)
        document["autoencoder"], autoencoder = measure_autoencoder(setting, extent.steps)
    if "attention" in parts:
        print("attention over packed rows", file=sys.stderr)
        document["attention"] = measure_attention(extent, peers=peers)
    if "model" in parts:
        print("a transformer like Wan's", file=sys.stderr)
        document["model"] = measure_model(extent, peers=peers)
    if "mfu" in parts:
        print("utilisation", file=sys.stderr)
        document["mfu"] = mfu.measure(mfu.SMALL if extent.small else mfu.Shape(), extent.steps, attention, peak)
    if "train" in parts:
        print("the training loop", file=sys.stderr)
        document["train"] = measure_loop(setting, extent, chosen)
    if "sampling" in parts:
        print("sampling", file=sys.stderr)
        document["sampling"] = measure_sampling(extent, run)
    if "tiling" in parts:
        print("tiles beside whole pictures", file=sys.stderr)
        document["tiling"] = measure_tiling(run, clips)
    if denoiser is not None and autoencoder is not None and "data" in parts:
        document["data"] = measure_data(setting, denoiser, autoencoder, extent, clips)
        if "latents" in document["data"]:
            # One for all sizes, prompts and steps, whichever way the rows come.
            both = document["denoiser"]["compilations"] + document["data"]["latents"]["compilations"]
            document["packed_step_compilations"] = both
    if peers and autoencoder is not None:
        document["autoencoder"]["peers"] = measure_peers(extent.rounds)
    return document


def measure_loop(setting: Setting, extent: Extent, chosen: Sequence[str]) -> dict[str, Any]:
    """What training costs beside its step."""
    try:
        from benchmarks import looping
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    return looping.measure(setting, extent.steps, extent.examples, extent.rounds, chosen)


def measure_peers(rounds: int) -> dict[str, Any]:
    """Other projects' models on the same weights."""
    try:
        from benchmarks import peers
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    print("autoencoders beside diffusers'", file=sys.stderr)
    return {"AutoencoderKLWan": peers.measure_against_diffusers(rounds)}


def measure_attention(extent: Extent, *, peers: bool) -> dict[str, Any]:
    """Our own beside dense ones, and torch's where that is installed."""
    from benchmarks import attention

    if not peers:
        return attention.measure(extent.tokens, extent.rounds)
    try:
        from benchmarks.peers import torch_attention
    except ModuleNotFoundError as error:
        found = attention.measure(extent.tokens, extent.rounds)
        return found | {"peers": {"skipped": f"{error.name} is not installed"}}
    return attention.measure(extent.tokens, extent.rounds, torch_attention)


def measure_model(extent: Extent, *, peers: bool) -> dict[str, Any]:
    """A forward pass and a training step, beside diffusers' where that is asked for; and compilation by depth."""
    try:
        from benchmarks import model
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    shape = model.SMALL if extent.small else model.Shape()
    compilation = {"compilation": model.measure_compilation(shape)}
    if not peers:
        return model.measure(shape, extent.rounds) | compilation
    try:
        from benchmarks.wan_peer import forms
    except ModuleNotFoundError as error:
        return model.measure(shape, extent.rounds) | compilation | {"peers": f"{error.name} is not installed"}
    return model.measure(shape, extent.rounds, forms) | compilation


def measure_sampling(extent: Extent, run: Path) -> dict[str, Any]:
    """Steps and guidance beside forward passes, of models like the quickstart's and larger; the first result."""
    shapes = {"small": sampling.SMALL}
    if not extent.small:
        shapes = {"quickstart": sampling.QUICKSTART, "larger": sampling.Shape()}
    found = {name: sampling.measure(shape, extent.rounds) for name, shape in shapes.items()}
    return found | ({} if extent.small else {"first result": sampling.first_result(run)})


def measure_tiling(run: Path, clips: Path | None) -> dict[str, Any]:
    """Of a trained autoencoder."""
    try:
        from benchmarks import tiling
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    return tiling.measure(run, clips)


def measure_data(
    setting: Setting, denoiser: Trained, autoencoder: Trained, extent: Extent, clips: Path | None
) -> dict[str, Any]:
    """Everything that needs the packages that read clips."""
    try:
        from benchmarks import data, live
    except ModuleNotFoundError as error:
        return {"skipped": f"{error.name} is not installed"}
    print("an epoch of the loader", file=sys.stderr)
    figures, denoiser = data.measure_latents(setting, denoiser, extent.examples)
    found: dict[str, Any] = {"latents": figures}
    print("the loader's memory", file=sys.stderr)
    found["memory"] = data.measure_memory(setting, extent.examples, extent.batches)
    with data.clips_of(clips, 48) as folder:
        print("training from video files", file=sys.stderr)
        found["videos"] = data.measure_videos(setting, autoencoder, folder, extent.steps)
        found["live"] = live.measure_live(setting, denoiser, folder, extent.steps)
        print("decoding", file=sys.stderr)
        found["decoding"] = data.measure_decoding(setting, folder, extent.rounds)
        print("ingest", file=sys.stderr)
        found["ingest"] = data.measure_ingest(folder, extent.rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; these by default; or {', '.join(BY_NAME)}"
    )
    parser.add_argument("--config", type=Path, help="a config file, instead of the quickstart's models")
    parser.add_argument("--clips", type=Path, help="a folder of clips, instead of rendered ones")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each model")
    parser.add_argument("--examples", type=int, default=400, help="clips of the data set of latents")
    parser.add_argument("--rounds", type=int, default=3, help="of what is compared in turn")
    parser.add_argument("--batches", type=int, default=10_000, help="over which the loader's memory is watched")
    parser.add_argument("--tokens", type=int, default=8192, help="of the rows that attention is timed on")
    parser.add_argument("--small", action="store_true", help="little models, for `model`, `mfu` and `sampling`")
    parser.add_argument("--attention", choices=get_args(Backend), default="auto", help="the backend that `mfu` uses")
    parser.add_argument("--peak", type=float, help="TFLOP/s in bfloat16 of a device that `mfu` doesn't know")
    parser.add_argument("--run", type=Path, default=PRETRAINED, help="whose tiles are measured, or first sample")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the setting")
    parser.add_argument("--peers", action="store_true", help="time other projects' models, too")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS + BY_NAME]:
        raise UserError(f"there is no part {unknown[0]!r}; use {', '.join(PARTS + BY_NAME)}")
    extent = Extent(**{field.name: getattr(arguments, field.name) for field in fields(Extent)})
    if arguments.clips is not None and not arguments.clips.is_dir():
        raise MissingError(f"no such folder: {arguments.clips}; name one with clips, or leave out --clips")
    setting = chosen_setting(arguments.config, arguments.set)
    chosen = [] if arguments.config is None else ["--config", str(arguments.config)]
    chosen += [part for assignment in arguments.set for part in ("--set", assignment)]
    found = benchmark(
        setting,
        arguments.parts or PARTS,
        extent,
        arguments.clips,
        run=arguments.run,
        peers=arguments.peers,
        attention=arguments.attention,
        peak=None if arguments.peak is None else arguments.peak * 1e12,
        chosen=chosen,
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    script(main)()
