"""The protocols of published data sets, from a folder in the set's layout to a report, with networks of full size.

Weights are random, as none can be shipped: the values mean nothing, but every file, shape and step is that of an
evaluation.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from dit_video.core.trees import flatten
from dit_video.evaluation.protocols import PROTOCOLS
from dit_video.models.features import ClipConfig, ClipTextConfig, ClipVisionConfig
from dit_video.models.features.convolutional import C3d, I3d, InceptionV3
from dit_video.nn import init_params
from dit_video.scenes import draw_scene, render
from dit_video.tokens import Grid
from dit_video.weights import save_clip
from dit_video.weights.feature_networks import (
    VIDEO_MAE,
    make_c3d_tensor_map,
    make_i3d_tensor_map,
    make_inception_tensor_map,
    make_video_mae_tensor_map,
)
from support.tiny_clip import END, write_tokenizer

pytestmark = pytest.mark.nightly

CLIP_TEXT = ClipTextConfig(width=768, layers=12, heads=12, mlp_width=3072, projection=768, end_token=END)
CLIP_VISION = ClipVisionConfig(width=1024, layers=24, heads=16, mlp_width=4096, projection=768, patch=14)
"""Towers of ViT-L/14."""
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "crop_size": 224,
    "size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""Settings that OpenAI's folder of it has."""
CLASSES = ("ApplyEyeMakeup", "BabyCrawling", "YoYo")
COUNT = 6


def write_clip_file(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = render(draw_scene(number, seed=5, level=2, sizes=[Grid(33, 48, 64)])).clip
    clip.save(path)


def write_ucf101(folder):
    """Write clips in UCF-101's layout; the container is another one, as of copies that were converted."""
    (folder / "ucfTrainTestlist").mkdir(parents=True)
    lists = {"train": [], "test": []}
    for number in range(COUNT):
        label = CLASSES[number % len(CLASSES)]
        name = f"{label}/v_{label}_g{number + 1:02d}_c01"
        write_clip_file(folder / "UCF-101" / f"{name}.mp4", number)
        lists["train"].append(f"{name}.avi {number % len(CLASSES) + 1}")
    lists["test"].append(f"{CLASSES[0]}/v_{CLASSES[0]}_g09_c01.avi")
    write_clip_file(folder / "UCF-101" / CLASSES[0] / f"v_{CLASSES[0]}_g09_c01.mp4", COUNT)
    texts = {"classInd": [f"{number} {label}" for number, label in enumerate(CLASSES, 1)]}
    texts |= {f"{split}list01": lines for split, lines in lists.items()}
    for name, lines in texts.items():
        (folder / "ucfTrainTestlist" / f"{name}.txt").write_text("\n".join(lines) + "\n")


def write_msrvtt(folder):
    """Write clips in MSR-VTT's layout: annotations of training and test videos, with several captions each."""
    videos, sentences = [], []
    for number in range(COUNT + 1):
        name, split = f"video{number}", "test" if number < COUNT else "train"
        write_clip_file(folder / ("TestVideo" if split == "test" else "TrainValVideo") / f"{name}.mp4", number)
        videos.append({"video_id": name, "split": split, "category": 1})
        sentences += [{"video_id": name, "caption": text} for text in (f"a red ball {number}", "a cube moves left")]
    for file, split in (("train_val_videodatainfo", "train"), ("test_videodatainfo", "test")):
        chosen = [video for video in videos if video["split"] == split]
        names = {video["video_id"] for video in chosen}
        own = [sentence for sentence in sentences if sentence["video_id"] in names]
        (folder / f"{file}.json").write_text(json.dumps({"videos": chosen, "sentences": own}))


def make_tensors(make, tensor_map, seed):
    """Return a network's initial parameters as its published file holds them."""
    params = flatten(jax.jit(init_params, static_argnums=0)(make, jax.random.key(seed)))
    tensors = {}
    for path, mapping in tensor_map.items():
        leaf = np.asarray(params[path])
        for layer, name in enumerate(mapping.names):
            tensors[name] = np.ascontiguousarray(mapping.to_theirs(leaf if mapping.layers is None else leaf[layer]))
    return tensors


def write_networks(folder, protocol):
    """Write the networks of a protocol in the files and shapes that are published."""
    folder.mkdir()
    if protocol == "ucf101":
        video_mae = make_tensors(VIDEO_MAE.make, make_video_mae_tensor_map(VIDEO_MAE), 1)
        safetensors.numpy.save_file(video_mae, folder / "video_mae.safetensors")
        del video_mae
        c3d = make_tensors(lambda rngs: C3d(rngs=rngs), make_c3d_tensor_map(), 2)
        c3d.pop("mean")
        np.savez(folder / "conv3d_deepnetA_ucf.npz", **c3d)
        np.savez(folder / "mean2.npz", mean=np.full((1, 3, 16, 128, 128), 100, np.float32))
    else:
        inception = make_tensors(lambda rngs: InceptionV3(rngs=rngs), make_inception_tensor_map(), 3)
        safetensors.numpy.save_file(inception, folder / "inception.safetensors")
        write_tokenizer(folder / "clip")
        (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        config = ClipConfig(text=CLIP_TEXT, vision=CLIP_VISION)
        save_clip(folder / "clip", config, jax.jit(init_params, static_argnums=0)(config.make, jax.random.key(4)))
    i3d = make_tensors(lambda rngs: I3d(rngs=rngs), make_i3d_tensor_map(), 5)
    safetensors.numpy.save_file(i3d, folder / "i3d.safetensors")


@pytest.mark.parametrize("name", ["ucf101", "msrvtt"])
def test_a_published_protocol_runs_from_the_sets_layout_to_a_report(name, tiny_run, tmp_path, script):
    {"ucf101": write_ucf101, "msrvtt": write_msrvtt}[name](tmp_path / "set")
    write_networks(tmp_path / "weights", name)
    options = ["--protocol", name, "--data", tmp_path / "set", "--weights", tmp_path / "weights", "--count", 4]
    out = tmp_path / "out"
    done = script("experiments/evaluate.py", tiny_run, "--out", out, "--steps", 2, "--fields", "real_count=4", *options)
    assert done.code == 0, done.err
    record = json.loads((out / name / "metrics.json").read_text())
    assert record["skipped"] == {}
    named = {value for metric in PROTOCOLS[name].metrics for value in metric.describe()}
    assert {result["name"] for result in record["results"]} == named
    values = [result["value"] for result in record["results"] if result["value"] is not None]
    assert values
    assert np.isfinite(values).all()
    assert len(list((out / name / "samples").glob("*.mp4"))) == 4
    assert Path(out / name / "report.html").is_file()
