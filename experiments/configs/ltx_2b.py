"""A denoiser with the shape of LTX-Video 2B on rows of 7,424 tokens, one clip of 161 frames of 512×704 (7,392 tokens).

    python experiments/train.py experiments/configs/ltx_2b.py --data CLIPS --workdir runs/ltx_2b
    python tools/plan.py experiments/configs/ltx_2b.py --topology v5p:2x2x4

Latents and embedded captions are cached first, with the autoencoder and the text encoder of the model's folder from
Hugging Face (Lightricks/LTX-Video-0.9.5). It is designed for v5p:2x2x4, and has not been trained.
"""

from dit_video.diffusion import ExponentialShift, Guidance, RectifiedFlow
from dit_video.distributed import Parallelism
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainDenoiser
from dit_video.models.autoencoders import LtxVaeConfig
from dit_video.models.backbones.ltx import LtxDitConfig
from dit_video.models.conditioning import FrameConditioning
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling import Sampling
from dit_video.tokens import PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant

_FOLDER = "LTX-Video-0.9.5"

EXPERIMENT = Experiment(
    name="ltx_2b",
    data=DataConfig(max_pixels=512 * 704, max_frames=161, workers=8),
    model=ModelConfig(
        autoencoder=LtxVaeConfig.ltx_095(),
        backbone=LtxDitConfig.ltx_2b(time_coordinate="frame seconds", dtype="bfloat16", remat="dots_attention"),
        text_encoder=FrozenTextConfig(folder=_FOLDER, width=4096, max_tokens=256, dtype="bfloat16"),
        process=RectifiedFlow(size_shift=ExponentialShift()),
        layout=PackedShape(tokens=7_424, text=1024, segments=4),
        frame_conditioning=FrameConditioning(),
        fps=25.0,
    ),
    autoencoder_from=f"{_FOLDER}/vae",
    stages=(
        TrainDenoiser(
            batch=32,
            optimizer=AdamW(learning_rate=1e-4, schedule=Constant(warmup=2000), b2=0.95, weight_decay=0.01),
            steps=100_000,
            ema_decay=0.9999,
        ),
    ),
    sampling=Sampling(steps=50, guidance=Guidance(scales={"text": 3.0})),
    parallel=Parallelism(data=-1, fsdp=16),
    save_every=1000,
)
