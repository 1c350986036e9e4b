"""diffusers' `WanTransformer3DModel` for `benchmarks.model`, eager and compiled."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel

from benchmarks.model import TIME, Inputs, ModelFunctions
from benchmarks.peers import count_cores
from benchmarks.train_step import LEARNING_RATE, WEIGHT_DECAY


def make_peer_functions(folder: Path, inputs: Inputs) -> dict[str, ModelFunctions]:
    """Make the eager model and, if it works, the one under `torch.compile`, each with its own weights."""
    torch.set_num_threads(count_cores())
    calls = {"diffusers": _make_functions(_load_model(folder), lambda model: model, inputs)}
    try:
        compiled = _make_functions(_load_model(folder), torch.compile, inputs)
        compiled.forward()
    except Exception as error:  # a missing or outdated compiler can raise anything
        print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        return calls
    return calls | {"diffusers, compiled": compiled}


def _load_model(folder: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)


def _make_functions(model: WanTransformer3DModel, transform: Callable[..., Any], inputs: Inputs) -> ModelFunctions:
    called = transform(model.eval())  # eval mode changes nothing, as the model has no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    latents, target = (_to_channels_first(array) for array in (inputs.latents, inputs.target))
    text, time = torch.from_numpy(inputs.text)[None], torch.full((1,), 1000 * TIME)

    def predict() -> torch.Tensor:
        return called(latents, time, text, return_dict=False)[0]

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return predict()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = (predict() - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return ModelFunctions(forward, step, lambda: np.ascontiguousarray(forward()[0].permute(1, 2, 3, 0).numpy()))


def _to_channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(3, 0, 1, 2)[None].contiguous()
