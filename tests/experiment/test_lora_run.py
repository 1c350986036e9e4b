"""A run that trains adapters of another run's denoiser."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import dit_video
from dit_video.core import trees
from dit_video.core.errors import MissingError, UserError
from dit_video.experiment import AllWeights, LoraAdapters
from dit_video.experiment.denoiser import open_trainable_denoiser
from dit_video.experiment.run import Run
from dit_video.nn import LoraConfig, merge_lora
from dit_video.training.optim.optimizer import AdamW
from dit_video.training.optim.schedules import Constant
from dit_video.weights import get_native_modules, load_lora, save
from dit_video.weights import load as load_weights
from support.interruptions import interrupt, wait_for_save

LORA = LoraConfig(rank=2, alpha=3.0, targets=(r"^backbone/blocks/.*kernel$",))


def adapting(tiny, tiny_run, folder, **changes):
    """Return a run with the data and autoencoder of the tiny run that trains adapters of its denoiser."""
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("denoiser", "pipeline"))
    (folder / "experiment.json").unlink()
    own = {
        "train": LoraAdapters(init_from=str(tiny_run), lora=LORA),
        "steps": 6,
        "optimizer": AdamW(learning_rate=3e-2, schedule=Constant(warmup=1)),
    }
    experiment = dataclasses.replace(tiny.EXPERIMENT, save_every=2, log_every=2).replace_stage(
        "denoiser", **own | changes
    )
    return Run(folder=folder, experiment=experiment, command="python train.py")._write_config()


def open_trained(run):
    """Return what a run trains of its denoiser."""
    is_resuming = run.open_checkpoints("denoiser").latest() is not None
    return open_trainable_denoiser(
        run.experiment.denoiser, run.model, run.folder / "denoiser", run.mesh, is_resuming=is_resuming
    )


@pytest.fixture(scope="module")
def adapted(tiny, tiny_run, tiny_clips, tmp_path_factory):
    """Return the folder of a finished adapter run, to be read only."""
    run = adapting(tiny, tiny_run, tmp_path_factory.mktemp("adapted") / "run")
    run.train(tiny_clips)
    return run.folder


def leaves(folder):
    return trees.flatten(load_weights(folder / "pipeline" / "denoiser.safetensors"))


@pytest.mark.slow
def test_adapters_alone_are_trained_and_the_result_is_merged(tiny_run, adapted):
    before, after = leaves(tiny_run), leaves(adapted)
    assert before.keys() == after.keys()
    targets = {path for path in before if path.startswith("backbone/blocks/") and path.endswith("kernel")}
    assert len(targets) > 3
    for path, leaf in before.items():
        moved = np.abs(after[path] - leaf).max()
        assert moved > 1e-4 if path in targets else moved == 0, path
    table = json.loads(next((adapted / "denoiser" / "checkpoints").glob("6/meta/metadata")).read_text())["arrays"]
    kinds = {path.split("/", 1)[0] for path in table}
    assert {"params", "ema", "opt_state"} <= kinds
    factors = {path for path in table if path.startswith(("params/", "ema/"))}
    assert factors == {f"{kind}/{path}/{leaf}" for kind in ("params", "ema") for path in targets for leaf in "ab"}
    largest = max(before[path].size for path in targets)
    assert max(np.prod(entry["shape"]) for entry in table.values()) < largest / 4


@pytest.mark.slow
def test_loading_the_adapter_file_into_the_base_model_gives_the_pipeline(tiny_run, adapted):
    start = load_weights(tiny_run / "pipeline" / "denoiser.safetensors")
    lora = load_lora(adapted / "adapter.safetensors", start, get_native_modules(start))
    result = trees.flatten(merge_lora(start, lora))
    for path, leaf in leaves(adapted).items():
        np.testing.assert_allclose(result[path], leaf, atol=1e-6, err_msg=path)
    clip = dit_video.load(adapted).generate("a red circle", size=(1, 16, 16))
    assert clip.frames.shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_an_interrupted_adapter_run_ends_bit_for_bit_like_the_uninterrupted_one(
    tiny, tiny_run, tiny_clips, adapted, tmp_path, monkeypatch
):
    run = adapting(tiny, tiny_run, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, call=4, how="killed")
        with pytest.raises(KeyboardInterrupt):
            run.train(tiny_clips)
    wait_for_save(run.folder / "denoiser", 2)
    unfinished = trees.flatten(dit_video.load(run.folder).denoiser_params)
    assert any(not np.array_equal(unfinished[path], leaf) for path, leaf in leaves(adapted).items())
    Run.open(run.folder).train(tiny_clips)
    for name in ("pipeline/denoiser.safetensors", "adapter.safetensors"):
        assert (run.folder / name).read_bytes() == (adapted / name).read_bytes()


@pytest.mark.slow
def test_continuing_from_other_base_weights_is_refused(tiny, tiny_run, adapted, tmp_path):
    start = shutil.copytree(tiny_run / "pipeline", tmp_path / "start")
    run = adapting(tiny, tiny_run, tmp_path / "run", train=LoraAdapters(init_from=str(start), lora=LORA))
    open_trained(run)
    weights = load_weights(start / "denoiser.safetensors")
    weights["backbone"]["head"]["bias"] = weights["backbone"]["head"]["bias"] + 1
    save(start / "denoiser.safetensors", weights)
    with pytest.raises(UserError, match=r"has other weights .* than before .*; put them back"):
        open_trained(run)


def test_a_missing_or_mismatched_base_model_is_refused(tiny, tiny_run, tmp_path):
    nowhere = LoraAdapters(init_from=str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match="no such file"):
        open_trained(adapting(tiny, tiny_run, tmp_path / "b", train=nowhere))
    run = adapting(tiny, tiny_run, tmp_path / "c")
    deep = dataclasses.replace(run, experiment=run.experiment.replace_backbone(layers=2))
    with pytest.raises(
        UserError, match="holds another denoiser than the config's, in backbone: layers is 1 there and 2"
    ):
        open_trained(deep)


@pytest.mark.slow
def test_all_weights_can_be_trained_on_from_another_run(tiny, tiny_run, tiny_clips, tmp_path):
    run = adapting(tiny, tiny_run, tmp_path / "run", train=AllWeights(init_from=str(tiny_run)), steps=2)
    run.train(tiny_clips)
    before, after = leaves(tiny_run), leaves(run.folder)
    drift = max(np.abs(after[path] - leaf).max() for path, leaf in before.items())
    assert 1e-4 < drift < 0.2  # two steps of .03 from there, not from another start
    assert not (run.folder / "adapter.safetensors").exists()
    shutil.rmtree(run.folder / "pipeline")
    elsewhere = AllWeights(init_from=str(tmp_path / "nowhere"))  # not needed any more
    moved = run.experiment.replace_stage("denoiser", train=elsewhere)
    open_trained(dataclasses.replace(run, experiment=moved))
