"""A video MoVQ: 4×8×8 pixels to one of 16,384 codes that modulate the decoder, trained against a PatchGAN.

    python experiments/train.py experiments/configs/movq.py --data CLIPS --workdir runs/movq --autoencoder-only

CLIPS are captioned clips and images; frames larger than 256×256 pixels are resized. Codes have 8 values and unit norm
(arXiv 2110.04627), are updated as moving averages of the latents, and restart when unused for 200 steps; the log has
`usage`, `usage_recent`, `perplexity` and `restarts`. Without `--autoencoder-only`, a denoiser of the latents before
quantization is trained next; decoding takes the nearest codes.

This config has not been trained, because no such hardware was available. The following numbers are computed from shapes
and from the step that XLA compiles for CPU: 56.6 M parameters, and 5.5 M of the discriminator; with averages and the
optimizers' moments the state takes 0.97 GB. In float32, a window of 9×128×128 takes 6.9 GB of activations and 2.7 TFLOP
per step, so a batch of 16 takes about 110 GB and 43 TFLOP; an image of 256×256 takes less than half of a window. In
bfloat16, as configured here, two devices with 80 GB are more than enough. The denoiser, of 120 M parameters, is a
starting point.
"""

from dit_video.data.windows import WindowConfig
from dit_video.diffusion import Guidance, RectifiedFlow
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import (
    AdversarialConfig,
    AutoencoderObjective,
    CausalVaeConfig,
    CodebookConfig,
    CodebookLearning,
    VqConfig,
)
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.sampling import Sampling
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW, Muon
from dit_video.training.optim.schedules import Cosine, WarmupStableDecay

EXPERIMENT = Experiment(
    name="movq",
    data=DataConfig(max_pixels=256 * 256, max_frames=17),
    model=ModelConfig(
        autoencoder=VqConfig(
            network=CausalVaeConfig(channels=16, width=64, bfloat16=True),
            codebook=CodebookConfig(codes=16384, width=8, spherical=True),
            modulated=True,
        ),
        backbone=DiTConfig(channels=8, context_width=256, patch=Grid(1, 2, 2), width=768, layers=12, heads=12),
        text_encoder=ByteEncoderConfig(width=256, layers=4, heads=4, max_tokens=256),
        process=RectifiedFlow(shift=3.0),
        layout=PackedShape(tokens=2560, text=1024, segments=16),
        fps=8.0,
    ),
    stages=(
        TrainAutoencoder(
            windows=(WindowConfig(size=Grid(9, 128, 128), batch=16), WindowConfig(size=Grid(1, 256, 256), batch=32)),
            optimizer=AdamW(learning_rate=2e-4, schedule=Cosine(warmup=1000)),
            steps=100_000,
            loss=AutoencoderObjective(
                kl=0.0,
                codebook=CodebookLearning(decay=0.99, restart_after=200),
                adversarial=AdversarialConfig(start_step=20_000),
            ),
            ema_decay=0.999,
        ),
        TrainDenoiser(
            batch=16,
            optimizer=Muon(learning_rate=1e-3, schedule=WarmupStableDecay(warmup=500), weight_decay=0.01),
            steps=50_000,
        ),
    ),
    sampling=Sampling(steps=40, guidance=Guidance(scales={"text": 3.0})),
    evaluation=CaptionEvaluation(trained=6, held_out=4),
)
