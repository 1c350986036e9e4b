"""The smallest experiment that goes through every stage: seconds of training on a few rendered clips.

    python experiments/train.py tests/support/tiny.py --data CLIPS --workdir RUN

CLIPS is made by `dit_video.scenes.shapes.write_folder` with `COUNT`, `SIZES` and seed 0. The model learns
almost nothing.
"""

from dit_video.data.windows import WindowConfig
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

COUNT = 24
SIZES = (Grid(1, 16, 16), Grid(5, 16, 16), Grid(9, 16, 32))
HELD_OUT = 3


def experiment(seed: int = 0, *, brief: bool = False) -> Experiment:
    """Return the experiment; the signature is that of the quickstart's."""
    return Experiment(
        name="tiny" if not brief else "tiny-brief",
        seed=seed,
        data=DataConfig(
            max_pixels=16 * 32,
            max_frames=9,
            held_out=tuple(
                shapes.get_file_name(index, seed=seed, sizes=SIZES) for index in range(COUNT - HELD_OUT, COUNT)
            ),
        ),
        model=ModelConfig(
            autoencoder=PatchVaeConfig(stride=Grid(4, 8, 8), channels=4, width=8, blocks=1),
            backbone=DiTConfig(channels=4, context_width=16, patch=Grid(1, 2, 2), width=24, layers=1, heads=2),
            text_encoder=ByteEncoderConfig(width=16, layers=1, heads=2, max_tokens=32),
            layout=PackedShape(tokens=12, text=96, segments=3),
        ),
        stages=(
            TrainAutoencoder(
                windows=(WindowConfig(size=Grid(5, 16, 16), batch=4),),
                optimizer=AdamW(learning_rate=3e-3, schedule=Cosine(warmup=2)),
                steps=8,
                loss=AutoencoderObjective.pixels(),
            ),
            TrainDenoiser(
                batch=2,
                optimizer=Muon(learning_rate=2e-3, schedule=WarmupStableDecay(warmup=2)),
                steps=10,
                ema_decay=0.9,
            ),
        ),
        sampling=Sampling(steps=2, guidance=2.0),
        evaluation=ShapesEvaluation(),
        log_every=3,
        save_every=4,
    )


EXPERIMENT = experiment()
