"""The network of `movq_scenes.py` as a VAE, for comparison.

    python experiments/train.py experiments/configs/movq_scenes_vae.py --data runs/scenes/videos \
        --workdir runs/movq_vae --autoencoder-only
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import movq_scenes

from dit_video.models.autoencoders import AutoencoderObjective

EXPERIMENT = dataclasses.replace(
    movq_scenes.EXPERIMENT.replace_model(autoencoder=movq_scenes.NETWORK),
    name="movq_scenes_vae",
    stages=(dataclasses.replace(movq_scenes.TRAINING, loss=AutoencoderObjective.pixels(kl=1e-4)),),
)
