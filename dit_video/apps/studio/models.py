"""The model of the studio: its forms, and its pipeline, which is loaded when it is first used."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_video.apps.studio.forms import FormField, get_size_steps, list_presets, make_sampling_form, make_tabs
from dit_video.apps.studio.uploads import ClipFit
from dit_video.core.errors import UserError
from dit_video.curation.raters.prompt_domains import load_default_prompt_domains
from dit_video.evaluation.config import CaptionEvaluation
from dit_video.loading import load
from dit_video.sampling.adapters import AdapterFile
from dit_video.sampling.expansion import PromptExpander
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig, is_pipeline_folder
from dit_video.sampling.request import Request

_EXAMPLES = 4
"""Number of prompts that are offered for open weights."""


class StudioModel:
    """A model that the studio samples.

    Args:
      folder: Folder of a run, a pipeline or open weights.
      config: Config of its pipeline.
      adapters: LoRA files that are attached.
      is_run: Whether the folder is a run, of whose checkpoints users may choose one.
      options: Further arguments of `dit_video.load`.
      expander: Language model that expands prompts, for a button beside them.
    """

    def __init__(
        self,
        folder: Path,
        config: PipelineConfig,
        *,
        adapters: Sequence[AdapterFile] = (),
        is_run: bool = False,
        options: Mapping[str, Any] | None = None,
        expander: PromptExpander | None = None,
    ):
        self.folder, self.config, self._is_run, self.expander = folder, config, is_run, expander
        self._options = dict(options or {})
        self.adapters: dict[str, AdapterFile] = {}
        """Attached adapters by name."""
        for adapter in adapters:
            if adapter.file.stem in self.adapters:
                raise UserError(f"--lora {adapter.file} is invalid: another file has this name. Rename one.")
            self.adapters[adapter.file.stem] = adapter
        self.tabs = make_tabs(config)
        self._loaded: tuple[int | None, Pipeline] | None = None

    @property
    def title(self) -> str:
        """Return the name of the model."""
        return self.config.provenance.get("experiment") or self.folder.resolve().name

    @property
    def is_trained(self) -> bool:
        """Return whether the model is finished: not a run that may be in training now."""
        return not self._is_run or is_pipeline_folder(self.folder / "pipeline")

    @property
    def sampling_form(self) -> tuple[FormField, ...]:
        """Return the fields that all tabs share, with the checkpoints that the run has now."""
        scales = {name: adapter.scale for name, adapter in self.adapters.items()}
        return make_sampling_form(self.config, adapters=scales, checkpoints=self._list_steps())

    @property
    def fit(self) -> ClipFit:
        """Return the rate, length and sizes of clips that uploads are fitted to."""
        config, steps = self.config, get_size_steps(self.config)
        return ClipFit(
            fps=config.fps,
            max_frames=config.size.t,
            stride=steps.t,
            multiple=(steps.h, steps.w),
            area=config.size.h * config.size.w,
            planes=tuple((size.h, size.w) for size in list_presets(config)),
        )

    def describe(self) -> dict[str, Any]:
        """Return the description of the model and of its forms for the page."""
        size = self.config.size
        summary = f"{size.t} frames of {size.w}×{size.h} pixels, {self.config.fps:g} per second"
        return {
            "title": self.title,
            "summary": summary,
            "tabs": [tab.describe() for tab in self.tabs],
            "sampling": [field.describe() for field in self.sampling_form],
            "examples": list(self.example_prompts),
            "expands": self.expander is not None,
        }

    @property
    def example_prompts(self) -> tuple[str, ...]:
        """Return prompts to try the model with: captions of its training, or for open weights what people film."""
        evaluation = self.config.evaluation or CaptionEvaluation()
        own = self.config.example_prompts or evaluation.example_prompts
        if own or "loaded from" not in self.config.provenance:
            return own
        prompts = load_default_prompt_domains().make_prompts(1)
        return tuple(prompts[:: len(prompts) // _EXAMPLES][:_EXAMPLES])

    def load(self, checkpoint: int | None, scales: Mapping[str, float]) -> Pipeline:
        """Return the pipeline of a checkpoint with scales of its adapters; one checkpoint is in memory.

        Raises:
          UserError: If `dit_video.load` refuses the folder.
        """
        if checkpoint is None and not self.is_trained:
            checkpoint = max(self._list_steps(), default=None)
        if self._loaded is None or self._loaded[0] != checkpoint:
            self._loaded = None
            pipeline = load(self.folder, step=checkpoint, **self._options)
            for name, adapter in self.adapters.items():
                pipeline = pipeline.load_lora(adapter.file, adapter.scale, expert=adapter.expert, name=name)
            self._loaded = checkpoint, pipeline
        pipeline = self._loaded[1]
        changed = {name: scale for name, scale in scales.items() if name in self.adapters}
        return pipeline.set_lora_scales(changed) if changed else pipeline

    def _list_steps(self) -> list[int]:
        # Imported here: a finished pipeline needs nothing of what training imports.
        from dit_video.experiment.checkpoints import list_checkpoints

        return [each.step for each in list_checkpoints(self.folder)] if self._is_run else []

    def make_example(self) -> Request:
        """Return a request of the model's own size, whose program most users need first."""
        return Request(next(iter(self.example_prompts), "a prompt"), self.config.size)
