"""The autoencoder of a laptop: 4×8×8 pixels to 16 numbers, trained on crops of real clips in half an hour on two cores.

    python experiments/train.py experiments/configs/autoencoder.py --data CLIPS --workdir runs/autoencoder \
        --autoencoder-only --data.held-out NAME NAME

It starts at the principal components of the training clips' patches, the best linear autoencoder of as many numbers,
and learns what is beyond them; the report says by how much, clip by clip. Without `--autoencoder-only` the small
denoiser of `clips.py` is trained on its latents.
"""

from dataclasses import replace

from configs import clips
from dit_video.autoencoder import AutoencoderObjective, PatchVaeConfig
from dit_video.data.windows import WindowConfig
from dit_video.experiment import AutoencoderTraining, Data
from dit_video.tokens import Grid, RowShape
from dit_video.training.optimizer import OptimizerConfig

EXPERIMENT = replace(
    clips.EXPERIMENT,
    name="autoencoder",
    data=Data(max_pixels=192 * 256, max_frames=17, fps=8.0, stretches=4),
    autoencoder=AutoencoderTraining(
        model=PatchVaeConfig(stride=Grid(4, 8, 8), channels=16, width=192, blocks=7),
        windows=(WindowConfig(size=Grid(9, 64, 64), batch=8, augment=True),),
        optimizer=OptimizerConfig(kind="muon", learning_rate=2e-3, schedule="cosine", warmup=50),
        steps=4000,
        loss=AutoencoderObjective.pixels(kl=1e-6),
        ema_decay=0.995,
    ),
    denoiser=replace(clips.EXPERIMENT.denoiser, rows=RowShape(tokens=960, text=512, segments=8)),
)
