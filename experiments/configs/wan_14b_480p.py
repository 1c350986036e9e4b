"""A denoiser with the shape of Wan 2.1 14B on rows of 32,768 tokens, one clip of 81 frames at 480p (32,760 tokens).

    python experiments/train.py experiments/configs/wan_14b_480p.py --data CLIPS --workdir runs/wan_14b_480p
    python tools/plan.py experiments/configs/wan_14b_480p.py --topology v5p:4x4x8

It is designed for v5p:4x4x8 and v6e:16x16, and has not been trained.
"""

from configs import wan
from dit_video.distributed import Parallelism
from dit_video.models.backbones.wan import WanDitConfig

EXPERIMENT = wan.make_experiment(
    "wan_14b_480p",
    WanDitConfig.t2v_14b(dtype="bfloat16", remat="attention"),
    folder="Wan2.1-T2V-14B-Diffusers",
    height=480,
    width=832,
    tokens=32_768,
    shift=3.0,
    batch=64,
    learning_rate=5e-5,
    parallel=Parallelism(data=1, fsdp=-1, context=4),
)
