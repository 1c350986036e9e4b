"""Denoisers with the shapes of Wan 2.1, trained from scratch on packed rows: what the `wan_*` configs share.

Latents and embedded captions are cached first, with the autoencoder and the text encoder of the model's folder from
Hugging Face (`vae`, `text_encoder` and `tokenizer`).

These configs have not been trained.
"""

from dit_video.diffusion import Guidance, RectifiedFlow
from dit_video.distributed import Parallelism
from dit_video.experiment import DataConfig, Experiment, ModelConfig, TrainDenoiser
from dit_video.models.autoencoders import CausalVaeConfig
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling import Sampling
from dit_video.tokens import PackedShape
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant


def make_experiment(
    name: str,
    backbone: WanDitConfig,
    *,
    folder: str,
    height: int,
    width: int,
    tokens: int,
    shift: float,
    batch: int,
    learning_rate: float,
    parallel: Parallelism,
) -> Experiment:
    """Return an experiment on clips of 81 frames at 16 frames per second.

    Args:
      name: Name of the experiment.
      backbone: Denoiser, a preset of `WanDitConfig`.
      folder: Folder of the published model, such as a copy of Wan-AI/Wan2.1-T2V-14B-Diffusers.
      height: Height of the largest clips; clips of other shapes have as many pixels at most.
      width: Width of the largest clips.
      tokens: Length of a row. It holds one of the largest clips, or up to four that are shorter or smaller.
      shift: Shift of the diffusion times towards noise, which grows with the number of tokens.
      batch: Number of rows of a step.
      learning_rate: Peak of the learning rate.
      parallel: Devices along each axis; `context` divides a row.
    """
    return Experiment(
        name=name,
        data=DataConfig(max_pixels=height * width, max_frames=81, workers=8),
        model=ModelConfig(
            autoencoder=CausalVaeConfig.wan21(),
            backbone=backbone,
            text_encoder=FrozenTextConfig(folder=folder, width=4096, max_tokens=512, dtype="bfloat16", cleaned=True),
            process=RectifiedFlow(shift=shift),
            layout=PackedShape(tokens=tokens, text=2048, segments=4),
            fps=16.0,
        ),
        autoencoder_from=f"{folder}/vae",
        stages=(
            TrainDenoiser(
                batch=batch,
                optimizer=AdamW(
                    learning_rate=learning_rate, schedule=Constant(warmup=2000), b2=0.95, weight_decay=0.01
                ),
                steps=100_000,
                ema_decay=0.9999,
            ),
        ),
        sampling=Sampling(steps=50, guidance=Guidance(scales={"text": 5.0})),
        parallel=parallel,
        save_every=1000,
    )
