"""FLUX's image autoencoder for clips: causal temporal layers in its decoder, trained alone against flicker.

    python experiments/train.py experiments/configs/inflation.py --data CLIPS --workdir runs/inflation \
        --autoencoder.init-from FLUX/vae

FLUX is a copy of black-forest-labs/FLUX.1-schnell from Hugging Face; only its folder `vae` is needed
(`config.json` and `diffusion_pytorch_model.safetensors`). The encoder is frozen, so the latents are FLUX's, with 16
channels per 1×8×8 pixels, and a denoiser of FLUX's latents needs no change.

CLIPS are captioned clips of at least 9 frames at 8 fps, ideally of 256×256 pixels or more; larger frames are resized.

This config has not been trained, because neither FLUX's weights nor the hardware were available. The following numbers
are computed from shapes and from the step that XLA compiles for CPU: 94.8 M parameters, of which the 10.9 M in temporal
layers are trained; parameters, their average and the optimizer's moments take 0.85 GB. A frame of 128×128 pixels takes
1.0 GB of float32 activations and 0.46 TFLOP per step, so a window of 9×256×256 takes about 37 GB (less in bfloat16 on a
GPU, as configured here) and 17 TFLOP: one window on each of eight devices with 80 GB. The denoiser, of 120 M
parameters, is a starting point.
"""

from dit_video.data.windows import WindowConfig
from dit_video.diffusion import Guidance, RectifiedFlow
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainAutoencoder, TrainDenoiser
from dit_video.models.autoencoders import AutoencoderObjective, ImageLevels, ImageVaeConfig, InflatedConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.sampling import Sampling
from dit_video.tokens import Grid, PackedShape
from dit_video.training.optim.optimizer import AdamW, Muon
from dit_video.training.optim.schedules import Cosine, WarmupStableDecay

EXPERIMENT = Experiment(
    name="inflation",
    data=DataConfig(max_pixels=256 * 256, max_frames=9),
    model=ModelConfig(
        autoencoder=InflatedConfig(
            image=ImageVaeConfig(
                channels=16, use_quant_conv=False, use_post_quant_conv=False, levels=ImageLevels(bfloat16=True)
            )
        ),
        backbone=DiTConfig(channels=16, context_width=256, patch=Grid(1, 2, 2), width=768, layers=12, heads=12),
        text_encoder=ByteEncoderConfig(width=256, layers=4, heads=4, max_tokens=256),
        process=RectifiedFlow(shift=3.0),
        layout=PackedShape(tokens=4608, text=1024, segments=16),
        fps=8.0,
    ),
    stages=(
        TrainAutoencoder(
            init_from="FLUX/vae",
            windows=(WindowConfig(size=Grid(9, 256, 256), batch=8), WindowConfig(size=Grid(9, 192, 320), batch=8)),
            optimizer=AdamW(learning_rate=1e-4, schedule=Cosine(warmup=500), trainable=("/temporal/",)),
            steps=20_000,
            loss=AutoencoderObjective(kl=0.0),
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
