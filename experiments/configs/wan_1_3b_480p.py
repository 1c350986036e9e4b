"""A denoiser with the shape of Wan 2.1 1.3B on rows of 32,768 tokens, one clip of 81 frames at 480p (32,760 tokens).

    python experiments/train.py experiments/configs/wan_1_3b_480p.py --data CLIPS --workdir runs/wan_1_3b_480p
    python tools/plan.py experiments/configs/wan_1_3b_480p.py --topology v5p:4x4x4

It is designed for v5p:4x4x4 and v6e:8x8, and has not been trained.
"""

from configs import wan
from dit_video.distributed import Parallelism
from dit_video.models.backbones.wan import WanDitConfig

EXPERIMENT = wan.make_experiment(
    "wan_1_3b_480p",
    WanDitConfig.t2v_1_3b(dtype="bfloat16", remat="dots_attention"),
    folder="Wan2.1-T2V-1.3B-Diffusers",
    height=480,
    width=832,
    tokens=32_768,
    shift=3.0,
    batch=16,
    learning_rate=1e-4,
    parallel=Parallelism(data=-1, fsdp=16, context=4),
)
