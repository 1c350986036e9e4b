"""The Python and the command that make a clip of the gallery again."""

import shlex
from collections.abc import Mapping
from typing import Any

from dit_video.apps.studio.gallery import get_input_file
from dit_video.apps.studio.submission import Submission
from dit_video.sampling.adapters import AdapterFile
from dit_video.sampling.pipeline import Pipeline
from dit_video.video import Clip

_OPTIONS = {"frames": "new-frames"}
"""Options that have another name than the value."""
_METHODS = {"described_edit": "edit"}
"""Methods of a pipeline that have another name than the task."""
_NO_OPTION = ("source_guidance", "draws")
"""Values of tasks that the command has no option for."""


def format_python(submission: Submission, model: str, seed: int, adapters: Mapping[str, AdapterFile]) -> str:
    """Return Python that makes the clip of a seed; it reads the inputs from the working folder.

    Args:
      submission: the job.
      model: folder of the model.
      seed: seed of the clip.
      adapters: LoRA files of the model, by name.
    """
    values = {name: value for name, value in submission.values.items() if name not in submission.inputs}
    inputs = {name: _format_decode(name, clip) for name, clip in submission.inputs.items()}
    if submission.tab.task_name not in ("generate", "loop"):
        values = {name: value for name, value in values.items() if not _is_default(submission, name, value)}
    task = [f"{name}={name}" for name in inputs] + [f"{name}={value!r}" for name, value in values.items()]
    overrides = [f"{name}={value!r}" for name, value in submission.overrides.items()]
    imports = ["import dit_video"] + (["from dit_video.video import decode"] if inputs else [])
    if (method := _find_method(submission)) is not None:
        call = [f"result = pipe.{method}(", *(f"    {each}," for each in (*task, f"seed={seed}", *overrides)), ")"]
    else:
        kind = type(submission.task)
        imports.append(f"from {kind.__module__} import {kind.__qualname__}")
        arguments = [f"[{kind.__qualname__}({', '.join(task)})]", f"seeds=[{seed}]", *overrides]
        call = ["(result,) = pipe.run_tasks(", *(f"    {each}," for each in arguments), ")"]
    step = "" if submission.checkpoint is None else f", step={submission.checkpoint}"
    lines = [*imports, "", f"pipe = dit_video.load({model!r}{step})"]
    for adapter in _list_adapters(submission, adapters):
        expert = "" if adapter.expert == "backbone" else f", expert={adapter.expert!r}"
        lines.append(f"pipe = pipe.load_lora({adapter.file.name!r}, {adapter.scale:g}{expert})")
    lines += [f"{name} = {text}" for name, text in inputs.items()]
    return "\n".join([*lines, *call, 'result.save("result.apng")', ""])


def format_command(submission: Submission, model: str, seed: int, adapters: Mapping[str, AdapterFile]) -> str | None:
    """Return the command that makes the clip of a seed, which reads the inputs from the working folder.

    It is None for tasks of other packages, and for values that `sample.py` has no option for.

    Args:
      submission: the job.
      model: folder of the model.
      seed: seed of the clip.
      adapters: LoRA files of the model, by name.
    """
    task, values = submission.tab.task_name, dict(submission.values)
    if _find_method(submission) is None:
        return None
    if any(name in values and not _is_default(submission, name, values[name]) for name in _NO_OPTION):
        return None
    parts = ["python", "experiments/sample.py", model]
    if task != "generate":
        parts += ["--task", task]
    for name, value in values.items():
        if name in _NO_OPTION or value is False:
            continue
        option = "--" + _OPTIONS.get(name, name).replace("_", "-")
        parts += [option, _format_option(name, value, submission.inputs)]
    parts += ["--seed", str(seed)]
    for name, value in submission.overrides.items():
        parts += [f"--{name}", str(value)]
    if submission.checkpoint is not None:
        parts += ["--step", str(submission.checkpoint)]
    for adapter in _list_adapters(submission, adapters):
        parts += ["--lora", f"{adapter.file.name}@{adapter.scale:g}@{adapter.expert}"]
    return shlex.join([*parts, "--out", "result.mp4" if task == "generate" else "result"])


def _list_adapters(submission: Submission, adapters: Mapping[str, AdapterFile]) -> list[AdapterFile]:
    """Return the adapters with the scales of a job, without those that are turned off."""
    scaled = [each._replace(scale=submission.scales.get(name, each.scale)) for name, each in adapters.items()]
    return [each for each in scaled if each.scale != 0]


def _find_method(submission: Submission) -> str | None:
    """Return the name of the pipeline's method for a task; None for a task of another package."""
    name = submission.tab.task_name
    method = _METHODS.get(name, name)
    return method if hasattr(Pipeline, method) else None


def _format_decode(name: str, clip: Clip) -> str:
    suffix = get_input_file(clip.frames.shape)
    if name == "mask":
        return f'decode("mask.{suffix}").frames[0, ..., 0] > 127'
    return f'decode("{name}.{suffix}")'


def _format_option(name: str, value: Any, inputs: Mapping[str, Clip]) -> str:
    if name in inputs:
        return f"{name}.{get_input_file(inputs[name].frames.shape)}"
    return "x".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _is_default(submission: Submission, name: str, value: Any) -> bool:
    """Return whether a value is that of the task's class, which need not be written."""
    return name != "prompt" and getattr(type(submission.task), name, None) == value
