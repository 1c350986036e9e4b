"""A text-to-video model of rendered scenes with one or two textured objects, trained from scratch on a laptop.

    python tools/render_scenes.py --out runs/scenes/clips --count 8000
    python experiments/train.py experiments/configs/scenes.py --data runs/scenes/clips --workdir runs/scenes/text

The captions are long, of few words, which is why the text encoder reads words.
`scenes_tasks.py` is the same model with a mix of tasks.
"""

from dit_video.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.backbones.dit import DitConfig
from dit_video.data.windows import WindowConfig
from dit_video.diffusion import FlowMatching, LogitNormal, RectifiedFlow
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import AutoencoderTraining, DataConfig, DenoiserTraining, Experiment
from dit_video.generation import Sampling
from dit_video.text import WordEncoderConfig
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import OptimizerConfig

AUTOENCODER = AutoencoderTraining(
    model=PatchVaeConfig(stride=Grid(4, 8, 8), channels=8, width=128, blocks=3, preactivated=True),
    windows=(
        WindowConfig(size=Grid(17, 48, 48), batch=6),
        WindowConfig(size=Grid(9, 48, 48), batch=8),
        WindowConfig(size=Grid(1, 48, 48), batch=24),
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup=30),
    steps=2500,
    loss=AutoencoderObjective.pixels(kl=1e-4),
)
DENOISER = DenoiserTraining(
    backbone=DitConfig(channels=8, context_width=96, patch=Grid(1, 2, 2), width=208, layers=5, heads=4),
    text=WordEncoderConfig(width=96, layers=1, max_tokens=64),
    layout=PackedShape(tokens=120, text=256, segments=8),
    batch=10,
    optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, muon_rms=0.5, schedule="wsd", warmup=50, b2=0.99),
    steps=3000,
    objective=FlowMatching(process=RectifiedFlow(shift=4.0), times=LogitNormal()),
    ema_decay=0.995,
)

EXPERIMENT = Experiment(
    name="scenes",
    data=DataConfig(max_pixels=48 * 64, max_frames=17),
    autoencoder=AUTOENCODER,
    denoiser=DENOISER,
    sampling=Sampling(steps=32, guidance=2.0),
    evaluation=CaptionEvaluation(trained=8, held_out=0),
    save_every=300,
)
