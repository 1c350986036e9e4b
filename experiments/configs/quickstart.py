"""A text-to-video model trained from scratch on rendered shapes, on a laptop.

python experiments/quickstart.py
"""

from dit_video.data.windows import WindowConfig
from dit_video.diffusion import Guidance, RectifiedFlow
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import AutoencoderObjective, PatchVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.sampling import Sampling
from dit_video.scenes import shapes
from dit_video.scenes.shapes_evaluation import ShapesEvaluation
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW, Muon
from dit_video.training.optim.schedules import Cosine, WarmupStableDecay

NUM_CLIPS = 4000
NUM_HELD_OUT = 24
"""Number of clips, the last ones, that are not trained on but reconstructed for the report."""


def count_clips(*, brief: bool = False) -> int:
    """Return the number of clips to render."""
    return 200 if brief else NUM_CLIPS


def make_experiment(seed: int = 0, *, brief: bool = False) -> Experiment:
    """Return the experiment with a seed; `brief` makes it a smoke test of one minute that learns too little."""
    count = count_clips(brief=brief)
    autoencoder_steps, denoiser_steps = (60, 60) if brief else (1500, 2400)
    return Experiment(
        name="shapes",
        seed=seed,
        data=DataConfig(
            max_pixels=32 * 48,
            max_frames=17,
            held_out=tuple(shapes.get_file_name(index, seed=seed) for index in range(count - NUM_HELD_OUT, count)),
        ),
        model=ModelConfig(
            autoencoder=PatchVaeConfig(stride=Grid(4, 8, 8), channels=8, width=72, blocks=2),
            backbone=DiTConfig(channels=8, context_width=64, patch=Grid(1, 2, 2), width=176, layers=4, heads=4),
            text_encoder=ByteEncoderConfig(width=64, layers=1, max_tokens=64),
            process=RectifiedFlow(shift=5.0),
            layout=PackedShape(tokens=120, text=224, segments=12),
        ),
        stages=(
            TrainAutoencoder(
                windows=(
                    WindowConfig(size=Grid(17, 32, 32), batch=16),
                    WindowConfig(size=Grid(9, 32, 32), batch=16),
                    WindowConfig(size=Grid(1, 32, 32), batch=32),
                ),
                optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup=30)),
                steps=autoencoder_steps,
                loss=AutoencoderObjective.pixels(kl=1e-4),
            ),
            TrainDenoiser(
                batch=8,
                optimizer=Muon(learning_rate=3e-3, schedule=WarmupStableDecay(warmup=50), rms=0.5, b2=0.99),
                steps=denoiser_steps,
                ema_decay=0.995,
            ),
        ),
        sampling=Sampling(steps=32, guidance=Guidance(scales={"text": 1.1})),
        evaluation=ShapesEvaluation(),
        save_every=200,
    )


EXPERIMENT = make_experiment()
