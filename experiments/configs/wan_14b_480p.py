"""A denoiser with the shape of Wan 2.1 14B, trained from scratch on rows of 32,768 tokens.

    python experiments/train.py experiments/configs/wan_14b_480p.py --data CLIPS --workdir runs/wan_14b_480p
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v5p:4x4x8

A clip of 81 frames at 480p has 32,760 tokens. A row holds one such clip, or up to four that are shorter or smaller,
and is sharded over the `context` axis of the mesh.

Latents and embedded captions are cached first, with the autoencoder and the text encoder in the folder WAN, a copy of
Wan-AI/Wan2.1-T2V-14B-Diffusers from Hugging Face (`vae`, `text_encoder` and `tokenizer`).

This config has not been trained. It is designed for v5p:4x4x8 and v6e:16x16.
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

WAN = "Wan2.1-T2V-14B-Diffusers"

EXPERIMENT = Experiment(
    name="wan_14b_480p",
    data=DataConfig(max_pixels=480 * 832, max_frames=81, fps=16.0, workers=8),
    autoencoder=PretrainedAutoencoder(model=CausalVaeConfig.wan21(), folder=f"{WAN}/vae"),
    denoiser=DenoiserTraining(
        backbone=WanDitConfig.t2v_14b(dtype="bfloat16", remat="attention"),
        text=FrozenTextConfig(folder=WAN, width=4096, max_tokens=512, dtype="bfloat16", cleaned=True),
        layout=PackedShape(tokens=32_768, text=2048, segments=4),
        batch=64,
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup=2000, b2=0.95, weight_decay=0.01),
        steps=100_000,
        objective=FlowMatching(process=RectifiedFlow(shift=3.0), times=LogitNormal()),
        ema_decay=0.9999,
    ),
    sampling=Sampling(steps=50, guidance=5.0),
    mesh=MeshConfig(data=1, fsdp=-1, context=4),
    save_every=1000,
)
