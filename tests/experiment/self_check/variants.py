"""Small runs that faults are injected into, each of another kind of training, prepared up to their latents.

The clips are squares, wide and high ones of up to nine frames at two frame rates. A row has two to six of them.
"""

import functools
import itertools
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dit_video.data.ingest.engine import ingest
from dit_video.data.windows import WindowConfig
from dit_video.diffusion import FlowMatching, RectifiedFlow
from dit_video.experiment import (
    AllWeights,
    AutoencoderTraining,
    DataConfig,
    DenoiserTraining,
    Experiment,
    ExpertConfig,
    LoraAdapters,
    TemporalWeights,
)
from dit_video.experiment.run import Run
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DitConfig
from dit_video.models.backbones.dit.config import TemporalLayers
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import ByteEncoderConfig, FrozenTextConfig
from dit_video.nn import LoraConfig
from dit_video.nn.attention import SpaceOnly
from dit_video.sampling import Sampling
from dit_video.scenes import shapes
from dit_video.scenes.folder import ClipEntry, format_clip_name, write_clip_folder
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from dit_video.tokens import Grid, PackedShape, Rotary3d
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Cosine
from dit_video.training.step import TrainStep
from support.tiny_t5 import CONFIG as T5
from support.tiny_wan import DIT as WAN
from support.tiny_wan import TWO, write_wan

COUNT, HELD_OUT = 40, 4
SIZES = tuple(Grid(t, *frame) for frame, t in itertools.product(((32, 32), (32, 48), (48, 32)), (1, 5, 9)))
FPS = (8.0, 12.0)
"""Frame rates of the clips, in turn."""
STEPS = 50
"""Number of steps after a fault."""
RESUMED_STEP = 10
"""Step of the checkpoint that the variant `resumed` continues from."""
BOUNDARY = 0.6


@dataclass(frozen=True)
class Sources:
    """Files that the variants share, in one folder."""

    folder: Path

    @property
    def clips(self) -> Path:
        """Return the folder of the clips' files."""
        return self.folder / "clips"

    @property
    def data(self) -> Path:
        """Return the data set of the clips."""
        return self.folder / "data"

    @property
    def more_data(self) -> Path:
        """Return a second data set."""
        return self.folder / "more"

    @property
    def wan(self) -> Path:
        """Return a folder of Wan with two experts, in diffusers' layout."""
        return self.folder / "wan"

    def get_run(self, variant: str) -> Path:
        """Return the folder of a prepared run."""
        return self.folder / "runs" / variant


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kind of training, as a change of the plain one."""

    change: Callable[[Experiment, Sources], Experiment] = lambda experiment, _: experiment
    needs: tuple[str, ...] = ()
    """Variants that are trained before, because this one begins with their weights."""
    steps: int = STEPS
    is_trained: bool = False
    """True for a variant whose weights another one begins with."""


def get_names(count: int = COUNT) -> list[str]:
    """Return the file names of the first clips."""
    return [
        format_clip_name(index, frames=shapes.draw_example(index, seed=0, sizes=SIZES)[2].t) for index in range(count)
    ]


def write_clips(folder: Path, *, first: int = 0, count: int = COUNT) -> None:
    """Write clips `first`, … with their captions."""

    def render(index: int) -> shapes.Clip:
        return replace(shapes.render_example(index, seed=0, sizes=SIZES), fps=FPS[index % len(FPS)])

    entries = []
    for index in range(first, first + count):
        description, _, size = shapes.draw_example(index, seed=0, sizes=SIZES)
        draw = functools.partial(render, index)
        entries.append(ClipEntry(shapes.format_caption(description), size.t, draw))
    write_clip_folder(folder, entries, recipe={"first": first, "count": count})


def _make_plain(seed: int, steps: int) -> Experiment:
    return Experiment(
        name="plain",
        seed=seed,
        data=DataConfig(max_pixels=32 * 48, max_frames=9, held_out=tuple(get_names()[-HELD_OUT:])),
        autoencoder=AutoencoderTraining(
            model=PatchVaeConfig(stride=Grid(4, 8, 8), channels=4, width=8, blocks=1),
            windows=(WindowConfig(size=Grid(5, 16, 16), batch=8),),
            optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup=2)),
            steps=80,
            loss=AutoencoderObjective.pixels(),
        ),
        denoiser=DenoiserTraining(
            backbone=DitConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=48, layers=2, heads=2),
            text=ByteEncoderConfig(width=16, layers=1, heads=2, max_tokens=32),
            layout=PackedShape(tokens=40, text=192, segments=6),
            batch=4,
            objective=FlowMatching(process=RectifiedFlow(shift=3.0)),
            optimizer=AdamW(learning_rate=2e-3, schedule=Cosine(warmup=5), weight_decay=0.1, max_grad_norm=0.5),
            steps=steps,
            ema_decay=0.7,
        ),
        sampling=Sampling(steps=2, guidance=2.0),
        evaluation=ShapesEvaluation(),
        log_every=10,
        save_every=25,
    )


def _change(experiment: Experiment, backbone: dict | None = None, data: dict | None = None, **denoiser) -> Experiment:
    """Return the experiment with other values of the denoiser's training, its backbone and the data."""
    changed = replace(experiment.denoiser, backbone=experiment.denoiser.backbone.replace(**(backbone or {})))
    return replace(experiment, denoiser=replace(changed, **denoiser), data=replace(experiment.data, **(data or {})))


def _accumulate(experiment: Experiment, sources: Sources) -> Experiment:
    optimizer = replace(experiment.denoiser.optimizer, kind="muon", schedule="wsd")
    return _change(experiment, accumulation_steps=2, optimizer=optimizer)


def _freeze_text(experiment: Experiment, sources: Sources) -> Experiment:
    return _change(experiment, text=FrozenTextConfig(folder=str(sources.wan), width=T5.width, max_tokens=30))


def _expert(experiment: Experiment, sources: Sources) -> Experiment:
    weights, other = sources.wan / "transformer", sources.wan / "transformer_2"
    expert = ExpertConfig(expert="high", boundary=BOUNDARY, other_folder=str(other))
    changed = replace(_freeze_text(experiment, sources).denoiser, backbone=WAN)
    return replace(experiment, denoiser=replace(changed, train=AllWeights(init_from=str(weights), expert=expert)))


def _lora(experiment: Experiment, sources: Sources) -> Experiment:
    lora = LoraConfig(rank=4, alpha=8.0, targets=(r"^backbone/blocks/.*kernel$",))
    train = LoraAdapters(init_from=str(sources.get_run("base")), lora=lora)
    return _change(experiment, train=train)


_SPATIAL = {"pattern": SpaceOnly(), "temporal": TemporalLayers()}
_IN_SECONDS = {"time_coordinate": "seconds", "rotary": Rotary3d(split=(8, 8, 8), scale=(2.0, 1.0, 1.0))}

VARIANTS = {
    "plain": Variant(),
    "base": Variant(change=lambda e, s: _change(e, ema_decay=0.5), steps=30, is_trained=True),
    "spatial": Variant(change=lambda e, s: _change(e, backbone=_SPATIAL), steps=20, is_trained=True),
    "muon": Variant(change=_accumulate),
    "frozen text": Variant(change=_freeze_text),
    "lora": Variant(change=_lora, needs=("base",)),
    "finetune": Variant(
        change=lambda e, s: _change(e, train=AllWeights(init_from=str(s.get_run("base")))), needs=("base",)
    ),
    "temporal": Variant(
        change=lambda e, s: _change(e, backbone=_SPATIAL, train=TemporalWeights(init_from=str(s.get_run("spatial")))),
        needs=("spatial",),
    ),
    "expert": Variant(change=_expert),
    "first frame": Variant(
        change=lambda e, s: _change(e, backbone={"cond_channels": 5}, frame_conditioning=FrameConditioning(prob=0.7))
    ),
    "seconds": Variant(change=lambda e, s: _change(e, backbone=_IN_SECONDS, data={"fps": 8.0})),
    "online": Variant(change=lambda e, s: _change(e, data={"cache_latents": False})),
    "two data sets": Variant(change=lambda e, s: _change(e, data={"weights": (1.0, 1.0), "held_out": ()})),
    "resumed": Variant(steps=STEPS + RESUMED_STEP),
}
GOOD = tuple(name for name, variant in VARIANTS.items() if not variant.is_trained)
"""Variants that are trained without a fault, too."""


def make_experiment(variant: str, sources: Sources, *, seed: int = 0) -> Experiment:
    """Return the experiment of a variant, which checks itself unless it only makes weights for others."""
    experiment = VARIANTS[variant].change(_make_plain(seed, VARIANTS[variant].steps), sources)
    return replace(experiment, monitoring=MonitoringConfig(self_check=not VARIANTS[variant].is_trained))


def prepare_sources(folder: Path) -> Sources:
    """Write clips, data sets and the folder of Wan, and train the autoencoder of all variants."""
    sources = Sources(folder)
    write_clips(sources.clips)
    ingest(sources.clips, sources.data, is_fixed=True)
    write_clips(folder / "more clips", first=COUNT, count=COUNT // 2)
    ingest(folder / "more clips", sources.more_data, is_fixed=True)
    write_wan(sources.wan, **TWO)
    run = Run.create(folder / "first", make_experiment("plain", sources))
    run.take(sources.data)
    run.run_stages("autoencoder")
    return sources


def prepare_variant(variant: str, sources: Sources) -> None:
    """Make the run of a variant up to its latents, or to its checkpoint or its end where others continue from there."""
    run = _create(variant, sources, sources.get_run(variant), seed=0)
    if VARIANTS[variant].is_trained:
        run.run_stages()
    elif variant == "resumed":
        _train_until(RESUMED_STEP + 1, run)
    else:
        run.run_stages("latents" if run.experiment.data.cache_latents else "autoencoder")


def start_run(variant: str, sources: Sources, folder: Path, *, seed: int = 0) -> Run:
    """Return a run like the prepared one of a variant, which is to be continued.

    Args:
      variant: name of the variant.
      sources: the shared files.
      folder: folder of the run, which does not exist.
      seed: seed of the denoiser's training.
    """
    prepared = sources.get_run(variant)
    if variant == "resumed":
        shutil.copytree(prepared, folder, symlinks=True)
        return Run.open(folder)
    run = _create(variant, sources, folder, seed=seed)
    for name in ("latents", "text_encoder.json"):
        if (path := prepared / name).is_dir():
            shutil.copytree(path, folder / name)
        elif path.exists():
            shutil.copy(path, folder / name)
    return run


def _create(variant: str, sources: Sources, folder: Path, *, seed: int) -> Run:
    run = Run.create(folder, make_experiment(variant, sources, seed=seed))
    run.take(sources.data, *((sources.more_data,) if variant == "two data sets" else ()))
    (folder / "autoencoder").mkdir()
    shutil.copy(sources.folder / "first" / "autoencoder" / "weights.safetensors", folder / "autoencoder")
    return run


def _train_until(call: int, run: Run) -> None:
    """Train a run, and interrupt it like a scheduler at a call of its step, so that its state is saved."""
    compile_step = TrainStep.compile

    def compile_interrupted(*arguments, **keywords):
        step, calls = compile_step(*arguments, **keywords), itertools.count(2)

        def interrupted(state, batch):
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return step(state, batch)

        return interrupted

    TrainStep.compile = compile_interrupted
    try:
        run.run_stages()
    except KeyboardInterrupt:
        pass
    finally:
        TrainStep.compile = compile_step
