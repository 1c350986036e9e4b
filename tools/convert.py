"""Convert weights between file layouts: diffusers' or transformers', the authors' and ours."""

from dit_video.core.platform.scripts import prepare_script

prepare_script(__name__, huge_pages=False)

from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

import dit_video
from dit_video.core.command_line import parse_arguments
from dit_video.core.errors import UserError, script
from dit_video.families import save_autoencoder
from dit_video.families.convert import TargetLayout, check_destination, convert, convert_lora, convert_native_denoiser
from dit_video.families.family import INDEX
from dit_video.sampling.pipeline_config import is_pipeline_folder, read_pipeline_config
from dit_video.weights import load
from dit_video.weights.torch_files import convert_torch_file


def main(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")],
    to: TargetLayout | Literal["safetensors"],
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    model: Path | None = None,
) -> None:
    """Convert weights between file layouts: diffusers' or transformers', the authors' and ours.

    For example:

        python tools/convert.py Wan2.1-T2V-1.3B-Diffusers/transformer wan --to authors
        python tools/convert.py DiT-XL-2-256x256.safetensors dit --to diffusers --dtype bfloat16
        python tools/convert.py runs/mine/pipeline mine --to diffusers
        python tools/convert.py style.safetensors style-comfyui.safetensors --to authors --model wan
        python tools/convert.py rgb_imagenet.pt i3d.safetensors --to safetensors

    Args:
        source: Folder of a model (a denoiser, an autoencoder, a T5 or UMT5), checkpoint file of DiT or SiT, pipeline
            folder of ours or of diffusers, LoRA file (with --model), or file of PyTorch, which is read without running
            anything of it.
        destination: Folder to write, which must not exist yet; for a LoRA or a file of PyTorch, the file to write.
        to: Layout to write: diffusers, authors or dit_video; safetensors for the unchanged tensors of a PyTorch file.
        dtype: Data type of the written weights; the source's by default.
        model: Folder of the transformer that the LoRA adapts.
    """
    cast = None if dtype is None else jnp.dtype(dtype)
    if to == "safetensors":
        convert_torch_file(source, destination, dtype=cast)
    elif model is not None:
        convert_lora(source, destination, model, layout=to, dtype=cast)
    elif is_pipeline_folder(source):
        _convert_pipeline(source, destination, to, cast)
    elif (source / INDEX).is_file():
        if to != "dit_video":
            parts = ", ".join(sorted(path.parent.name for path in source.glob("*/config.json")))
            raise UserError(
                f"{source} is a whole diffusers pipeline, which cannot be converted at once; convert each part: {parts}"
            )
        check_destination(destination)
        # In float32, so that nothing is rounded on the way.
        dit_video.load(source, dtype="float32").save(destination, dtype=dtype or "float32")
    else:
        convert(source, destination, layout=to, dtype=cast)
    files = [destination] if destination.is_file() else [path for path in destination.rglob("*") if path.is_file()]
    print(f"{destination}: {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {len(files)} files")


def _convert_pipeline(source: Path, destination: Path, to: TargetLayout, dtype: jnp.dtype | None) -> None:
    """Convert a pipeline of ours to folders of its denoisers and its autoencoder."""
    if to == "dit_video":
        raise UserError(f"{source} is a pipeline of ours already; use tools/export.py to change its dtype")
    config = read_pipeline_config(source)
    check_destination(destination)
    experts = {"backbone": "transformer"} | ({} if config.boundary is None else {"low_noise": "transformer_2"})
    for name, folder in experts.items():
        file = source / "denoiser.safetensors"
        convert_native_denoiser(file, f"{name}/", config.model.backbone, destination / folder, layout=to, dtype=dtype)
    save_autoencoder(destination / "vae", config.model.autoencoder, load(source / "autoencoder.safetensors"))


if __name__ == "__main__":
    script(parse_arguments, is_resumable=False)(main)
