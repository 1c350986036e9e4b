"""Serve the studio of a model, and the page of its training run: `python -m dit_video.web RUN_OR_FOLDER`."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__)

import hashlib
from pathlib import Path
from typing import Annotated, Any

import tyro

from dit_video.core.command_line import parse_arguments, parse_memory
from dit_video.core.errors import MissingError, UserError, check_devices, script
from dit_video.core.platform.compilation_cache import enable_compilation_cache
from dit_video.distributed.mesh import parse_parallelism
from dit_video.families.expansion_options import ExpansionOptions
from dit_video.families.family import Dtype
from dit_video.loading import find_folder, read_config
from dit_video.nn.attention import BackendName
from dit_video.sampling.adapters import AdapterFile
from dit_video.sampling.pipeline_config import RUN_CONFIG

DEFAULT_PORT = 7860
_EXPANSION = ExpansionOptions()


def main(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FOLDER")],
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    token: str | None = None,
    out: Path = Path("runs/studio"),
    lora: tuple[str, ...] = (),
    upload_limit: str = "200MiB",
    text_encoder: Path | None = None,
    dtype: Dtype | None = None,
    attention: BackendName | None = None,
    parallel: str | None = None,
    expansion: Annotated[ExpansionOptions, tyro.conf.arg(name="")] = _EXPANSION,
    cache: bool = True,
) -> None:
    """Serve a page on which a model is sampled, and one that follows its training run.

    For example:

        python -m dit_video.web experiments/pretrained/shapes
        python -m dit_video.web runs/clips --port 8000
        python -m dit_video.web Wan2.1-T2V-1.3B-Diffusers --lora style.safetensors@0.8 --host 0.0.0.0

    Args:
        folder: Folder of a run, which may be in training, of a pipeline or of open weights.
        host: Address to listen at. By default only this machine's browsers reach it; at 0.0.0.0 all do that have the
            token.
        port: Port to listen at; 0 for any that is free.
        token: Text that browsers send once, in the address that is printed; random by default for another host than
            127.0.0.1, where there is none.
        out: Folder of uploads and galleries, which has a folder for each model.
        lora: LoRA files to attach, each FILE, FILE@SCALE or FILE@SCALE@EXPERT; the page has a scale for each.
        upload_limit: Maximum size of an uploaded file.
        text_encoder: Folder of the model's frozen text encoder, if it has been moved.
        dtype: Dtype of matrix products of open weights, bfloat16 by default; that of a run is its own.
        attention: Backend of attention instead of the model's own; auto takes the best one for the devices.
        parallel: Devices that sample together, such as data=2,context=4 for branches of guidance and tokens, and
            perhaps context_attention=ring.
        expansion: Language model for a button beside prompts.
        cache: Keep compiled programs in ~/.cache/dit_video/programs, so that the next start is faster.
    """
    try:
        from dit_video.apps import server
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed. Use pip install 'dit-video[web]'") from error
    from dit_video.apps.access import AccessRules, is_loopback, make_token
    from dit_video.apps.studio.models import StudioModel

    check_devices()
    local_folder, max_upload = find_folder(folder), parse_memory(upload_limit)
    is_run, is_local = (local_folder / RUN_CONFIG).is_file(), is_loopback(host)
    config = read_config(local_folder, text_encoder=text_encoder, dtype=dtype)
    if config is None and not is_run:
        raise MissingError(f"{folder} holds no model: use the folder of a run, of a pipeline or of open weights")
    access = AccessRules(is_local=is_local and token is None, token=token if is_local else token or make_token())
    adapters = [AdapterFile.parse(text) for text in lora]
    options: dict[str, Any] = {"text_encoder": text_encoder, "dtype": dtype, "attention": attention}
    options["parallel"] = None if parallel is None else parse_parallelism(parallel)
    model = None
    if config is not None:
        expander = expansion.make_expander(config.model.backbone)
        model = StudioModel(local_folder, config, adapters=adapters, is_run=is_run, options=options, expander=expander)
    listener = server.open_socket(host, port)
    settings = server.ServerConfig(
        title=local_folder.resolve().name if model is None else model.title,
        run=local_folder if is_run else None,
        root=out / _make_name(local_folder),
        access=access,
        max_upload=max_upload,
    )
    if cache:
        enable_compilation_cache()
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}/" + (f"?token={access.token}" if access.token else "")
    print(f"studio of {settings.title}: {address}", flush=True)
    server.serve(server.make_app(settings, model), listener)


def _make_name(folder: Path) -> str:
    """Return the name of the folder of a model's users."""
    place = folder.resolve()
    return f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
