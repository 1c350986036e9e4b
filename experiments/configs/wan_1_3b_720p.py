"""A denoiser with the shape of Wan 2.1 1.3B, trained from scratch on rows of 75,776 tokens.

    python experiments/train.py experiments/configs/wan_1_3b_720p.py --data CLIPS --workdir runs/wan_1_3b_720p
    python tools/plan.py experiments/configs/wan_1_3b_720p.py --topology v5p:4x4x4

A clip of 81 frames at 720p has 75,600 tokens. A row holds one such clip, or up to four that are shorter or smaller,
and is sharded over the `context` axis of the mesh.

Latents and embedded captions are cached first, with the autoencoder and the text encoder in the folder WAN, a copy of
Wan-AI/Wan2.1-T2V-1.3B-Diffusers from Hugging Face (`vae`, `text_encoder` and `tokenizer`).

This config has not been trained. It is designed for v5p:4x4x4 and v6e:8x8.
"""

from dit_video.autoencoders import CausalVaeConfig
from dit_video.backbones.wan import WanDitConfig
from dit_video.diffusion import FlowMatching, LogitNormal, RectifiedFlow
from dit_video.distributed import MeshConfig
from dit_video.experiment import DataConfig, DenoiserTraining, Experiment, PretrainedAutoencoder
from dit_video.generation import Sampling
from dit_video.text import FrozenTextConfig
from dit_video.tokens import PackedShape
from dit_video.training.optim.optimizer import OptimizerConfig

WAN = "Wan2.1-T2V-1.3B-Diffusers"

EXPERIMENT = Experiment(
    name="wan_1_3b_720p",
    data=DataConfig(max_pixels=720 * 1280, max_frames=81, fps=16.0, workers=8),
    autoencoder=PretrainedAutoencoder(model=CausalVaeConfig.wan21(), folder=f"{WAN}/vae"),
    denoiser=DenoiserTraining(
        backbone=WanDitConfig.t2v_1_3b(dtype="bfloat16", remat="attention"),
        text=FrozenTextConfig(folder=WAN, width=4096, max_tokens=512, dtype="bfloat16", cleaned=True),
        layout=PackedShape(tokens=75_776, text=2048, segments=4),
        batch=16,
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup=2000, b2=0.95, weight_decay=0.01),
        steps=100_000,
        objective=FlowMatching(process=RectifiedFlow(shift=5.0), times=LogitNormal()),
        ema_decay=0.9999,
    ),
    sampling=Sampling(steps=50, guidance=5.0),
    mesh=MeshConfig(data=-1, fsdp=16, context=4),
    save_every=1000,
)
