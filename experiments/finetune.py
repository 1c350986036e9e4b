"""Fine-tune open weights on a folder of clips, sample the result and write its report.

    python experiments/finetune.py MODEL --data CLIPS --workdir runs/mine

MODEL is a folder of Wan in diffusers' layout (2.1 T2V 1.3B or 14B, I2V 14B, 2.2 TI2V 5B, T2V or I2V A14B), CLIPS as
for `train.py`: video files with a `metadata.csv`, or a data set. Autoencoder, text encoder and image encoder stay as
they are: clips, captions and first frames are encoded once, then the transformer is trained:

    --train lora        adapters alone (--lora.rank 16, --lora.targets …): pytorch_lora_weights.safetensors in the run's
                        folder is what diffusers' load_lora_weights(RUN) and ComfyUI read
    --train full        all weights; RUN/transformer is what diffusers' WanTransformer3DModel reads
    --train temporal    layers in time alone, of a model that has them
    --train scratch     all weights, from random ones

Of the two experts of A14B one is trained, at its own times: --expert high (noisy times) or low, which is then
RUN/transformer_2. The run samples with both; adapters of both are put together by
`dit_video.load(MODEL).load_lora(HIGH).load_lora(LOW, expert="low_noise")`.

Samples of the clips' captions, of a model that animates an image each beginning with its clip's first frame, lie in
RUN/samples, all figures in RUN/report.html; `dit_video.load(RUN)` samples more, of others `sample.py` does too.
Interrupted, the same command continues where it was. What this command does not offer is set in a config of one's own:
`EXPERIMENT = finetuning(MODEL, FineTuning(...))`, for `train.py`.
"""

from dit_video.platform.huge_pages import use_huge_pages

use_huge_pages(__name__)

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parent))

from train import train

from dit_video.core.errors import UserError, script
from dit_video.experiment import datasets
from dit_video.experiment.export import ADAPTER, LORA, TRANSFORMERS
from dit_video.experiment.run import Run
from dit_video.platform.compilation_cache import keep_programs
from dit_video.recipes.finetune_wan import FineTuning, finetuning


@dataclass(frozen=True)
class Arguments:
    """Fine-tune a folder of Wan on clips, and sample it."""

    model: Annotated[Path, tyro.conf.Positional]
    """a folder of Wan in diffusers' layout"""
    data: tuple[str, ...]
    """folders of clips, or data sets that tools/ingest.py made"""
    workdir: Path | None = None
    """the run's folder; runs/NAME by default"""
    latents: str | None = None
    """where cached latents are, or are to be written: a folder or gs://…; WORKDIR/latents by default"""
    options: Annotated[FineTuning, tyro.conf.arg(name="")] = field(default_factory=FineTuning)
    cache: bool = True
    """whether compiled programs are kept for the next start, in ~/.cache/dit_video/programs"""


def main() -> None:
    arguments = tyro.cli(Arguments)
    if arguments.cache:
        keep_programs()
    if not arguments.data:
        raise UserError("--data names no folder; give one or more: --data CLIPS")
    datasets.check(arguments.data)  # before a run is made of it
    began = time.perf_counter()
    experiment = finetuning(arguments.model, arguments.options)
    run = Run.create(arguments.workdir or Path("runs") / experiment.name, experiment)
    train(run, arguments.data, latents=arguments.latents)
    for name in (LORA, ADAPTER, *TRANSFORMERS.values()):
        if (run.folder / name).exists():
            print(run.folder / name)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; look at {run.folder / 'report.html'}")


if __name__ == "__main__":
    script(main)()
