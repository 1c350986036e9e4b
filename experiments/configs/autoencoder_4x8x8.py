"""An autoencoder of Wan 2.1's size: 4×8×8 pixels to 16 channels, trained from scratch. Not trained here.

    python experiments/train.py experiments/configs/autoencoder_4x8x8.py --data DATA --workdir runs/4x8x8

It is designed for 8 accelerators with 80 GB, with one clip on each. The data are videos of two lengths and three aspect
ratios, and images in every fifth step. The loss is the default objective, with a discriminator in the second half of
the training. LPIPS improves it further (`--autoencoder.loss.lpips 0.5 --autoencoder.loss.lpips-weights FILE`, see
`dit_video.weights.load_lpips`).

The following numbers are computed from shapes and from XLA's count for the lowered step, for one clip of 17×256×256:

    parameters                          126.9 M, and 5.5 M of the discriminator
    step without, with discriminator    51.9, 52.3 TFLOP (15.1 forward, of which 6.6 are computed twice)
    kept for the backward pass          6.5 GB, recomputing residual blocks (46.7 without; an image 0.9, 3.7)
    state                               2.1 GB: parameters, their average, Adam's moments, the discriminator's

200,000 steps take about 6×10^19 FLOP.
"""

from dit_video.data.windows import WindowConfig
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import AdversarialConfig, AutoencoderObjective, CausalVaeConfig, LeCam
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant

BATCH = 8

EXPERIMENT = Experiment(
    name="autoencoder-4x8x8",
    data=DataConfig(max_pixels=256 * 256, max_frames=17, clips_per_video=4),
    model=ModelConfig(
        autoencoder=CausalVaeConfig(bfloat16=True, remat=True),
        backbone=DiTConfig(channels=16, context_width=512, width=768, layers=12, heads=12),
        text_encoder=ByteEncoderConfig(width=512, layers=6, max_tokens=256),
        layout=PackedShape(tokens=2560, text=2048, segments=16),
        fps=16.0,
    ),
    stages=(
        TrainAutoencoder(
            windows=(
                WindowConfig(size=Grid(17, 256, 256), batch=BATCH),
                WindowConfig(size=Grid(17, 192, 320), batch=BATCH),
                WindowConfig(size=Grid(17, 320, 192), batch=BATCH),
                WindowConfig(size=Grid(9, 256, 256), batch=BATCH),
                WindowConfig(size=Grid(1, 256, 256), batch=4 * BATCH),
            ),
            optimizer=AdamW(learning_rate=1e-4, schedule=Constant(warmup=1000), b1=0.9, b2=0.95),
            steps=200_000,
            loss=AutoencoderObjective(
                kl=1e-6,
                adversarial=AdversarialConfig(start_step=100_000, regulariser=LeCam()),
            ),
            ema_decay=0.999,
        ),
        TrainDenoiser(
            batch=16,
            optimizer=AdamW(learning_rate=2e-4, schedule=Constant(warmup=1000)),
            steps=200_000,
            ema_decay=0.9999,
        ),
    ),
)
