"""Record what trainings and samplings compute, to the bit, and compare it after a change that must keep all numbers.

    python .ci/baseline.py write .ci/baseline.json
    python .ci/baseline.py compare .ci/baseline.json
    python .ci/baseline.py compare .ci/baseline.json --only 'training: (plain|muon)'

Entries are of trainings (digests of batches and states, losses and gradient norms of every step), of tasks, samplers
and guidance of a tiny trained pipeline, and of small random models of every family. They have digests of arrays, and
numbers that tell how large a difference is, but no name of a module, class or parameter, and nothing of a config.

Bits depend on the CPU and on the release of JAX, which the file names. On another machine, write a file before the
change. With `JAX_COMPILATION_CACHE_DIR` in the environment, programs are not compiled again by the next comparison.
"""

# ruff: noqa: E402 (imports need the folders)

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (ROOT, ROOT / "tests", ROOT / "experiments"))

import jax
import numpy as np
from experiment.self_check import variants

from configs import quickstart, unet
from dit_video import Clip, Pipeline, load
from dit_video.data.latents.codec import LatentCodec
from dit_video.diffusion import (
    SOLVERS,
    AdaptiveProjectedGuidance,
    Guidance,
    SkipLayerGuidance,
    ZeroStarGuidance,
)
from dit_video.experiment.run import Run
from dit_video.families import load_autoencoder, save_autoencoder, save_denoiser
from dit_video.models.autoencoders import CodebookConfig, ImageLevels, ImageVaeConfig, VqConfig
from dit_video.sampling.tasks import (
    Blend,
    DescribedEdit,
    Edit,
    Extend,
    Inpaint,
    Interpolate,
    Loop,
    Outpaint,
    Task,
    Vary,
    ZoomOut,
)
from dit_video.scenes import shapes
from support import tiny
from support.quick_compilation import set_quick_flags, share_contexts
from support.random_params import make_random_params
from support.tiny_class_dit import DIT, SIT
from support.tiny_ltx import RESIDUAL_VAE, write_ltx
from support.tiny_ltx import SIZE as LTX_SIZE
from support.tiny_ltx import VAE as LTX_VAE
from support.tiny_vace import write_vace
from support.tiny_wan import DIT as WAN
from support.tiny_wan import SIZE as WAN_SIZE
from support.tiny_wan import TWO, write_animating_wan, write_wan
from support.tiny_wan import VAE as WAN_VAE

Entry = dict[str, Any]
"""Digests and numbers, by what they are of."""
Entries = dict[str, Callable[[], Entry]]
"""Functions that compute entries, by name."""

STEPS = 20
"""Number of steps of a training."""
MODELS = ("autoencoder", "denoiser")
"""Models that a run trains, one after the other."""
PROMPT = "a red ball moves left"
IMAGE_VAE = ImageVaeConfig(channels=3, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2))
MOVQ = VqConfig(
    network=ImageVaeConfig(channels=4, levels=ImageLevels(widths=(32,), blocks=1, attention=(0,))),
    codebook=CodebookConfig(codes=9, width=4),
    modulated=True,
    quantized_decoding=False,
)


def list_variants(folder: Path) -> Entries:
    """Return the trainings of the self-check, without the one that continues `plain`, with the same numbers."""
    names = [name for name in variants.VARIANTS if name != "resumed"]
    for name in names:  # like those with whose weights others begin, all are trained to the end, without a self-check
        variants.VARIANTS[name] = replace(variants.VARIANTS[name], steps=STEPS, is_trained=True)

    @functools.cache
    def prepare() -> variants.Sources:
        return variants.prepare_sources(folder / "sources")

    @functools.cache
    def train(name: str) -> Path:
        for other in variants.VARIANTS[name].needs:
            train(other)
        variants.prepare_variant(name, prepare())
        return prepare().get_run(name)

    entries: Entries = {"training: autoencoder": lambda: read_chain(prepare().folder / "first" / "autoencoder")}
    return entries | {f"training: {name}": lambda name=name: read_chain(train(name) / "denoiser") for name in names}


def list_quickstarts(folder: Path) -> Entries:
    """Return the trainings of the quickstart, with a transformer and with a U-Net, in fewer steps of fewer clips."""

    @functools.cache
    def train(name: str) -> Path:
        experiment = {"quickstart": quickstart, "unet": unet}[name].make_experiment(brief=True)
        windows = tuple(replace(window, batch=2) for window in experiment.autoencoder.windows)
        for model, changes in (("autoencoder", {"windows": windows}), ("denoiser", {"batch": 1})):
            optimizer = experiment.get_stage(model).optimizer
            optimizer = replace(optimizer, schedule=replace(optimizer.schedule, warmup=STEPS // 4))
            experiment = experiment.replace_stage(model, steps=STEPS, optimizer=optimizer, **changes)
        return train_on_shapes(folder / name, experiment, quickstart.count_clips(brief=True))

    names = [(name, model) for name in ("quickstart", "unet") for model in MODELS]
    return {f"{name}: {model}": lambda name=name, model=model: read_chain(train(name) / model) for name, model in names}


def list_samples(folder: Path) -> Entries:
    """Return the training of a tiny pipeline, and its samples: of every task, sampler and kind of guidance."""

    @functools.cache
    def train() -> Path:
        experiment = tiny.experiment()
        experiment = experiment.replace_backbone(layers=2)  # of which one can be skipped
        return train_on_shapes(folder / "tiny", experiment, tiny.COUNT, sizes=tiny.SIZES)

    size, clip = (9, 16, 32), draw_clip((9, 16, 32))
    first, last, short = clip.frames[0], clip.frames[-1], draw_clip((5, 16, 32))
    box = np.zeros(size[1:], bool)
    box[4:12, 8:24] = True
    described = functools.partial(DescribedEdit, clip, PROMPT, source="a blue ball")
    others: dict[str, Task] = {
        "extend": Extend(clip, PROMPT, frames=4),
        "extend before": Extend(clip, PROMPT, frames=4, before=True),
        "blend": Blend(clip, draw_clip(size, seed=1), PROMPT, frames=3, overlap=5),
        "interpolate": Interpolate(short, PROMPT, factor=2),
        "interpolate at times": Interpolate(short, PROMPT, places=(0, 1, 2, 5, 8)),
        "inpaint": Inpaint(clip, box, PROMPT),
        "outpaint": Outpaint(short, (32, 48), PROMPT),
        "edit": Edit(clip, PROMPT),
        "described edit": described(draws=2),
        "described edit by inversion": described(edit_method="inversion"),
        "vary": Vary(clip, PROMPT),
        "loop": Loop(PROMPT, size=(8, 16, 32)),
        "zoom out": ZoomOut(draw_clip((1, 16, 32)), PROMPT, frames=2, factor=1.5),
    }

    def run(pipeline: Pipeline, *, task: Task, **options: Any) -> Clip:
        guidance = 1.5 if isinstance(task, DescribedEdit) else None
        return pipeline.run(task, guidance=guidance, **options)

    tasks: dict[str, Callable[..., Clip]] = {
        "text to video": lambda p, **o: p.generate(PROMPT, size=size, **o),
        "text to image": lambda p, **o: p.generate(PROMPT, size=(1, 16, 32), **o),
        "negative prompt": lambda p, **o: p.generate(PROMPT, size=size, negative="a cube", **o),
        "image to video": lambda p, **o: p.generate(PROMPT, size=size, image=first, **o),
        "first and last image": lambda p, **o: p.generate(PROMPT, size=size, image=first, last_image=last, **o),
        "resampling": lambda p, **o: p.generate(PROMPT, size=size, image=first, resample=2, **o),
    } | {name: functools.partial(run, task=task) for name, task in others.items()}
    guidance = {
        "rescaled in an interval": Guidance(scales={"text": 4.0}, rescale=0.7, interval=(0.2, 0.9)),
        "projected": Guidance(scales={"text": 4.0}, method=AdaptiveProjectedGuidance(max_rms=0.5, momentum=-0.5)),
        "zero star": Guidance(scales={"text": 4.0}, method=ZeroStarGuidance()),
        "skipped layers": Guidance(
            scales={"text": 2.0}, skip_layers=SkipLayerGuidance(layers=(1,), start=0.1, stop=0.9)
        ),
    }
    calls = {f"task: {name}": functools.partial(task, steps=4) for name, task in tasks.items()}
    generate = functools.partial(tasks["text to video"], steps=5)
    calls |= {f"sampler: {name}": functools.partial(generate, solver=name) for name in SOLVERS}
    calls |= {f"guidance: {name}": functools.partial(generate, guidance=each) for name, each in guidance.items()}
    trainings = {f"tiny: {model}": lambda model=model: read_chain(train() / model) for model in MODELS}
    return trainings | {name: lambda call=call: sample(load(train()), call) for name, call in calls.items()}


def list_families(folder: Path) -> Entries:
    """Return samples of small random pipelines of every family, and the codes of clips of their autoencoders."""

    def write_class_dit(path: Path, backbone: Any) -> None:
        save_denoiser(path / "transformer", backbone, make_random_params(backbone.make), layout="authors")
        save_autoencoder(path / "vae", IMAGE_VAE, make_random_params(IMAGE_VAE.make))

    def sample_family(write: Callable[[Path], None], size: tuple[int, int, int] | None, *pictures: str) -> Entry:
        clip = draw_clip(size or (1, 16, 16))
        known = {"image": clip.frames[0], "last_image": clip.frames[-1], "reference_images": [clip.frames[-1]]}
        known |= {"control": clip, "video": clip, "generated": clip.frames[..., 0] <= 127}
        options = {name: known[name] for name in pictures} | {"size": size, "steps": 3, "guidance": 2.0}
        path = Path(tempfile.mkdtemp(dir=folder)) / "pipeline"
        write(path)
        call = functools.partial(Pipeline.generate, prompt=PROMPT if size else 2, **options)
        return sample(load(path, dtype="float32"), call)

    def code(config: Any) -> Entry:
        path = Path(tempfile.mkdtemp(dir=folder))
        save_autoencoder(path, config, make_random_params(config.make))
        codec = LatentCodec(*load_autoencoder(path))
        stride, side = config.stride, min(8 * config.stride.h, 32)
        latents = codec.encode(draw_clip((1 if stride.t == 1 else 1 + 2 * stride.t, side, side)))
        return describe(latents=latents, frames=codec.decode(latents, fps=8.0).frames)

    with_token_time = functools.partial(write_wan, backbone=replace(WAN, time="token"))
    with_conditions = functools.partial(write_ltx, kind="LTXConditionPipeline")
    pipelines: dict[str, tuple[Any, ...]] = {
        "wan": (write_wan, WAN_SIZE),
        "wan with two experts": (functools.partial(write_wan, **TWO), WAN_SIZE),
        "wan with a time per token": (with_token_time, WAN_SIZE, "image"),
        "wan from images": (write_animating_wan, WAN_SIZE, "image", "last_image"),
        "vace": (write_vace, WAN_SIZE, "control", "video", "generated", "reference_images"),
        "ltx": (functools.partial(write_ltx, shift=3.0), LTX_SIZE),
        "ltx from images": (with_conditions, LTX_SIZE, "image"),
        "dit": (functools.partial(write_class_dit, backbone=DIT), None),
        "sit": (functools.partial(write_class_dit, backbone=SIT), None),
    }
    autoencoders = {
        "stable diffusion": IMAGE_VAE,
        "kandinsky": MOVQ,
        "wan": WAN_VAE,
        "wan with shortcuts": replace(WAN_VAE, decoder_width=6, patch=2, shortcuts=True),
        "ltx": LTX_VAE,
        "ltx with residuals": RESIDUAL_VAE,
    }
    entries: Entries = {f"family: {name}": functools.partial(sample_family, *each) for name, each in pipelines.items()}
    return entries | {f"autoencoder: {name}": functools.partial(code, each) for name, each in autoencoders.items()}


PARTS = ((list_variants, list_samples), (list_quickstarts, list_families))
"""What each of two processes computes, about equally long."""


def train_on_shapes(folder: Path, experiment: Any, count: int, **options: Any) -> Path:
    """Train a run on rendered clips, and return its folder."""
    shapes.write_folder(folder / "clips", count=count, seed=0, **options)
    Run.create(folder / "run", experiment).train(folder / "clips")
    return folder / "run"


def read_chain(folder: Path) -> Entry:
    """Return the first steps and all states of the hash chain of a training, without the paths of arrays."""
    entry: Entry = {}
    for record in map(json.loads, (folder / "hash_chain.jsonl").read_text().splitlines()):
        step = record["step"]
        if "state" in record:
            entry[f"state {step}"] = shorten("".join(sorted(record["state"].values())).encode())
        elif "batch" in record and step <= STEPS:
            entry[f"batch {step}"] = shorten("".join(sorted(record["batch"].values())).encode())
            entry |= {f"{name} {step}": float.fromhex(record[name]) for name in ("loss", "gradient_norm")}
    return entry


def draw_clip(size: tuple[int, int, int], *, seed: int = 0) -> Clip:
    return Clip(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8), 8.0)


def sample(pipeline: Pipeline, call: Callable[..., Clip]) -> Entry:
    """Return the frames that a call gives, and the latents on the way to them, whose bits frames round away."""
    latents: list[Any] = []
    clip = call(pipeline, seed=3, callback=lambda each: latents.extend(each.progress.estimate_latents().values()))
    return describe(latents=np.concatenate([np.ravel(each) for each in latents]), frames=clip.frames)


def describe(**arrays: np.ndarray) -> Entry:
    """Return the digest of each array and its root mean square."""
    entry: Entry = {}
    for name, array in arrays.items():
        entry[name] = shorten(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        entry[f"size of {name}"] = float(np.sqrt(np.square(array.astype(np.float64)).mean()))
    return entry


def shorten(content: bytes) -> str:
    """Return a digest of 16 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:16]


def compute_part(number: int, folder: Path, pattern: str) -> tuple[dict[str, Entry], float]:
    """Compute the entries of a part, and the CPU time that it takes; an entry that fails has its error."""
    share_contexts()
    warnings.simplefilter("ignore")
    entries: dict[str, Entry] = {}
    for name, compute in (pair for list_entries in PARTS[number] for pair in list_entries(folder).items()):
        if re.search(pattern, name):
            start, log = time.process_time(), io.StringIO()
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    entries[name] = compute()
            except Exception as error:
                traceback.print_exc()
                entries[name] = {"error": repr(error)}
            print(f"{time.process_time() - start:6.1f} s  {name}", flush=True)
    return entries, time.process_time()


def compute_all(pattern: str) -> dict[str, Entry]:
    """Compute the entries whose names have the pattern, in two processes with a temporary folder."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/programs")
        os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        os.environ |= {"JAX_PLATFORMS": "cpu"}
        set_quick_flags()
        with ProcessPoolExecutor(len(PARTS), multiprocessing.get_context("spawn")) as pool:
            parts = [pool.submit(compute_part, number, Path(folder), pattern) for number in range(len(PARTS))]
            results = [part.result() for part in parts]
    entries = {name: entry for entries, _ in results for name, entry in entries.items()}
    cpu_seconds = sum(seconds for _, seconds in results)
    print(f"{len(entries)} entries in {time.monotonic() - start:.0f} s, {cpu_seconds:.0f} s of CPUs", flush=True)
    return entries


def describe_machine() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text() if path.is_file() else "")
    return {"cpu": found[1] if found else "unknown", "cores": os.cpu_count(), "jax": jax.__version__}


def write(path: Path, pattern: str) -> bool:
    """Write the file with the entries that can be computed, and return whether all can."""
    entries = compute_all(pattern)
    whole = {name: entry for name, entry in sorted(entries.items()) if "error" not in entry}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in whole.items())
    path.write_text(f'{{\n "machine": {json.dumps(describe_machine())},\n "entries": {{\n{lines}\n }}\n}}\n')
    return len(whole) == len(entries)


def compare(path: Path, pattern: str) -> bool:
    """Print which entries differ from those of the file, and return whether none does."""
    document, machine = json.loads(path.read_text()), describe_machine()
    if document["machine"] != machine:
        print(f"{path} was made on {document['machine']}; bits may differ on this machine, {machine}")
    old = {name: entry for name, entry in document["entries"].items() if re.search(pattern, name)}
    new = compute_all(pattern)
    differences = {name: describe_difference(old.get(name, {}), new.get(name, {})) for name in sorted(old | new)}
    for name, difference in differences.items():
        print(f"differs  {name}: {difference}" if difference else f"equal    {name}")
    count = sum(map(bool, differences.values()))
    print(f"{count} of {len(differences)} entries differ")
    return not count


def describe_difference(old: Entry, new: Entry) -> str:
    """Return which value differs first, and by how much numbers differ at most; empty if nothing does."""
    if not old or not new or "error" in new:
        return new.get("error", "not in the file" if new else "not computed any more")
    names = [name for name in old | new if old.get(name) != new.get(name)]
    numbers = [(old[name], new[name]) for name in names if isinstance(old.get(name), float) and name in new]
    error = max((abs(one - other) / abs(one) for one, other in numbers if one), default=0.0)
    return f"{names[0]}, and {len(names) - 1} more values; numbers by up to {error:.0e}" if names else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "compare"])
    parser.add_argument("file", type=Path, help="JSON file.")
    parser.add_argument("--only", default="", metavar="PATTERN", help="Regular expression of names of entries.")
    arguments = parser.parse_args()
    run = {"write": write, "compare": compare}[arguments.command]
    raise SystemExit(not run(arguments.file, arguments.only))


if __name__ == "__main__":
    main()
