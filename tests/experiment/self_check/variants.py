"""Small runs that faults are injected into, each of another kind of training, prepared up to their latents.

The clips are squares, wide and high ones of up to nine frames at two frame rates. A row has two to six of them.
"""

import functools
import itertools
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dit_video.data.ingest.engine import ingest
from dit_video.data.windows import WindowConfig
from dit_video.diffusion import RectifiedFlow
from dit_video.experiment import (
    AllWeights,
    DataConfig,
    Experiment,
    ExpertConfig,
    LoraAdapters,
    ModelConfig,
    TemporalWeights,
    TrainAutoencoder,
    TrainDenoiser,
)
from dit_video.experiment.run import Run
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.spatio_temporal import SpatioTemporalDiTConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import ByteEncoderConfig, FrozenTextConfig
from dit_video.nn import LoraConfig
from dit_video.sampling import Sampling
from dit_video.scenes import shapes
from dit_video.scenes.folder import ClipEntry, format_clip_name, write_clip_folder
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from dit_video.tokens import Grid, PackedShape, Rotary3d
from dit_video.training.hooks.metric_logs import MonitoringConfig
from dit_video.training.optim.optimizer import AdamW, Muon
from dit_video.training.optim.schedules import Cosine, WarmupStableDecay
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
        model=ModelConfig(
            autoencoder=PatchVaeConfig(stride=Grid(4, 8, 8), channels=4, width=8, blocks=1),
            backbone=DiTConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=48, layers=2, heads=2),
            text_encoder=ByteEncoderConfig(width=16, layers=1, heads=2, max_tokens=32),
            process=RectifiedFlow(shift=3.0),
            layout=PackedShape(tokens=40, text=192, segments=6),
        ),
        stages=(
            TrainAutoencoder(
                windows=(WindowConfig(size=Grid(5, 16, 16), batch=8),),
                optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup=2)),
                steps=80,
                loss=AutoencoderObjective.pixels(),
            ),
            TrainDenoiser(
                batch=4,
                optimizer=AdamW(learning_rate=2e-3, schedule=Cosine(warmup=5), weight_decay=0.1, max_grad_norm=0.5),
                steps=steps,
                ema_decay=0.7,
            ),
        ),
        sampling=Sampling(steps=2, guidance=2.0),
        evaluation=ShapesEvaluation(),
        log_every=10,
        save_every=25,
    )


def _change_data(experiment: Experiment, **changes) -> Experiment:
    return replace(experiment, data=replace(experiment.data, **changes))


def _accumulate(experiment: Experiment, sources: Sources) -> Experiment:
    own = experiment.denoiser.optimizer
    common = {each.name: getattr(own, each.name) for each in fields(own)}
    optimizer = Muon(**common | {"schedule": WarmupStableDecay(warmup=own.schedule.warmup)})
    return experiment.replace_stage("denoiser", accumulation_steps=2, optimizer=optimizer)


def _freeze_text(experiment: Experiment, sources: Sources) -> Experiment:
    text = FrozenTextConfig(folder=str(sources.wan), width=T5.width, max_tokens=30)
    return experiment.replace_model(text_encoder=text)


def _expert(experiment: Experiment, sources: Sources) -> Experiment:
    weights, other = sources.wan / "transformer", sources.wan / "transformer_2"
    expert = ExpertConfig(expert="high", boundary=BOUNDARY, other_folder=str(other))
    changed = _freeze_text(experiment, sources).replace_model(backbone=WAN)
    return changed.replace_stage("denoiser", train=AllWeights(init_from=str(weights), expert=expert))


def _lora(experiment: Experiment, sources: Sources) -> Experiment:
    lora = LoraConfig(rank=4, alpha=8.0, targets=(r"^backbone/blocks/.*kernel$",))
    train = LoraAdapters(init_from=str(sources.get_run("base")), lora=lora)
    return experiment.replace_stage("denoiser", train=train)


def _train_temporal_layers(experiment: Experiment, sources: Sources) -> Experiment:
    train = TemporalWeights(init_from=str(sources.get_run("spatial")))
    return _space_and_time(experiment, sources).replace_stage("denoiser", train=train)


def _condition_on_first_frames(experiment: Experiment, sources: Sources) -> Experiment:
    backbone = experiment.get_model().backbone.replace(cond_channels=5)
    return experiment.replace_model(backbone=backbone, frame_conditioning=FrameConditioning(prob=0.7))


def _space_and_time(experiment: Experiment, sources: Sources) -> Experiment:
    own = experiment.get_model().backbone
    sizes = {name: getattr(own, name) for name in ("channels", "context_width", "patch")}
    return experiment.replace_model(backbone=SpatioTemporalDiTConfig(**sizes, width=48, layers=2, heads=2))


_IN_SECONDS = {"time_coordinate": "seconds", "rotary": Rotary3d(split=(8, 8, 8), scale=(2.0, 1.0, 1.0))}

VARIANTS = {
    "plain": Variant(),
    "base": Variant(change=lambda e, s: e.replace_stage("denoiser", ema_decay=0.5), steps=30, is_trained=True),
    "spatial": Variant(change=_space_and_time, steps=20, is_trained=True),
    "muon": Variant(change=_accumulate),
    "frozen text": Variant(change=_freeze_text),
    "lora": Variant(change=_lora, needs=("base",)),
    "finetune": Variant(
        change=lambda e, s: e.replace_stage("denoiser", train=AllWeights(init_from=str(s.get_run("base")))),
        needs=("base",),
    ),
    "temporal": Variant(change=_train_temporal_layers, needs=("spatial",)),
    "expert": Variant(change=_expert),
    "first frame": Variant(change=_condition_on_first_frames),
    "seconds": Variant(change=lambda e, s: e.replace_backbone(**_IN_SECONDS).replace_model(fps=8.0)),
    "online": Variant(change=lambda e, s: _change_data(e, cache_latents=False)),
    "two data sets": Variant(change=lambda e, s: _change_data(e, weights=(1.0, 1.0), held_out=())),
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
        run.experiment.denoiser.encode_latents(run)


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
