"""Fine-tune a trained model on a folder of clips, sample the result and write its report.

MODEL is a folder of Wan (2.1 T2V 1.3B or 14B, I2V 14B, 2.2 TI2V 5B, T2V or I2V A14B), of VACE (1.3B or 14B) or of
LTX-Video 0.9 in the diffusers layout, of DiT or SiT, or a finished run or a pipeline of your own; or its address, or
its name on the Hugging Face hub, as `dit_video.load` takes them. CLIPS is the same as for `train.py`: a folder of video
files with a `metadata.csv`, or a data set; the captions for DiT and SiT are classes. The autoencoder, a frozen text
encoder and the image encoder stay as they are: clips, captions and first frames are encoded once, then the transformer
is trained:

    --train lora        LoRA adapters only (--lora.rank 16, --lora.targets …); pytorch_lora_weights.safetensors in the
                        run's folder can be loaded with diffusers' load_lora_weights(RUN) and with ComfyUI
    --train full        all weights; RUN/transformer can be loaded with diffusers' class of the model
    --train temporal    only the temporal layers, which an image model gets (--temporal-layers …)
    --train scratch     all weights, from random initialization

A14B has two experts; one is trained, on its own range of times: --expert high (noisy times) or --expert low,
which is written to RUN/transformer_2. The run samples with both. To combine the adapters of both, use
`dit_video.load(MODEL).load_lora(HIGH).load_lora(LOW, expert="low_noise")`.

RUN/samples holds samples of the clips' captions; samples of image-to-video models begin with the clip's first frame.
RUN/report.html shows all metrics. Use `dit_video.load(RUN)` to sample more, or `sample.py` for a model that needs no
image. After an interruption, run the same command again to continue. Several processes, on one host or many, train one
run together, as with `train.py` (see experiments/launch); --parallel.fsdp and its like divide the devices. For settings
that this command does not offer, write a config with
`EXPERIMENT = make_finetuning_experiment(MODEL, FineTuningOptions(...))` and use `train.py`.
"""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).parent))

from train import evaluate_run

from dit_video.core.command_line import check_minimum, parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.distributed.faults.timeouts import TimeoutConfig
from dit_video.distributed.gather import is_first_process
from dit_video.experiment import datasets
from dit_video.experiment.export import ADAPTER_FILE, LORA_FILE
from dit_video.experiment.launch import open_run
from dit_video.experiment.recipes.finetune import FineTuningOptions, make_finetuning_experiment
from dit_video.families.family import DENOISER_FOLDERS
from dit_video.loading import find_folder


@dataclass(frozen=True)
class Arguments:
    """Fine-tune a trained model on a folder of clips, sample the result and write its report.

    For example:

        python experiments/finetune.py Wan2.1-T2V-1.3B-Diffusers --data CLIPS --workdir runs/mine
        python experiments/finetune.py Wan2.2-T2V-A14B-Diffusers --data CLIPS --train full --expert low
        python experiments/finetune.py Wan2.1-VACE-1.3B-diffusers --data CLIPS --workdir runs/vace
        python experiments/finetune.py LTX-Video-0.9.5 --data CLIPS --workdir runs/ltx
        python experiments/finetune.py runs/images --data CLIPS --train temporal --max-frames 17
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model of Wan, VACE or LTX-Video in the diffusers layout, of DiT or SiT, or of a run or a pipeline; or
    its address (gs://…), or its name on the Hugging Face hub (Wan-AI/Wan2.1-T2V-1.3B-Diffusers)."""
    data: tuple[str, ...]
    """Folders of clips, or data sets written by tools/ingest.py."""
    workdir: str | None = None
    """Folder or address (gs://…) of the run; runs/NAME by default."""
    latents: str | None = None
    """Folder or address (gs://…) to read cached latents from, or write them to; WORKDIR/latents by default."""
    options: Annotated[FineTuningOptions, tyro.conf.arg(name="")] = field(default_factory=FineTuningOptions)
    cache: bool = True
    """Keep compiled programs, so that the next start is faster: in ~/.cache/dit_video/programs, or in WORKDIR/.programs
    if WORKDIR is an address, or several processes share no home."""
    stopped_code: int = 0
    """Exit code after SIGTERM or Ctrl-C; use 75 for a manager that takes 0 for finished, such as Kubernetes."""
    patience: TimeoutConfig = field(default_factory=TimeoutConfig)
    """Timeouts of the processes of a run when they wait for each other."""


def main() -> None:
    arguments = parse_arguments(Arguments)
    options = arguments.options
    check_minimum(1, steps=options.steps, batch=options.batch, sampling_steps=options.sampling_steps)
    check_minimum(0, samples=options.samples, seed=options.seed)
    if not arguments.data:
        raise UserError("--data is empty: it needs at least one folder. Use --data CLIPS")
    start_time = time.perf_counter()
    experiment = make_finetuning_experiment(find_folder(arguments.model), arguments.options)
    workdir = arguments.workdir or f"runs/{experiment.name}"
    datasets.check_datasets(arguments.data, workdir=workdir)  # fail before the run's folder is created
    launch: dict[str, Any] = {"timeouts": arguments.patience, "stopped_code": arguments.stopped_code}
    with open_run(workdir, experiment, **launch) as run:
        if arguments.cache:
            enable_compilation_cache(run_folder=workdir)
        run.prepare(*arguments.data, latents=arguments.latents)
        run.run_stages()
        evaluate_run(run)
    if not is_first_process():
        return
    for name in (LORA_FILE, ADAPTER_FILE, *DENOISER_FOLDERS.values()):
        if (run.folder / name).exists():
            print(f"{workdir}/{name}")
    print(f"{(time.perf_counter() - start_time) / 60:.1f} minutes; report: {workdir}/report.html")


if __name__ == "__main__":
    script(main)()
