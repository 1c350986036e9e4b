"""The published folders of Wan: every name, shape and setting in them is known; no weight is read."""

import hashlib
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import dit_video
from dit_video.core.errors import MissingError, UserError
from dit_video.families import find_family, load_denoiser
from dit_video.families.convert import convert
from dit_video.families.family import LoadOptions
from dit_video.families.wan.pipeline import NEGATIVE, find_defaults
from dit_video.weights import load, save
from support.marks import mark_slow_except
from support.tiny_wan import TWO, write_animating_wan, write_wan
from support.wan_folders import FOLDERS, write_published_folder

# Bytes and hashes of files on the hub: SHA-256, or the SHA-1 of the Git blob. The inventories of
# Wan-AI/Wan2.1-T2V-1.3B-Diffusers at 0fad780a, of Wan-AI/Wan2.2-T2V-A14B-Diffusers and of a mirror of the files of
# Wan-AI/Wan2.2-TI2V-5B-Diffusers at b8fff731 are public in projects that check their downloads.
T2V, A14B, TI2V = "Wan2.1-T2V-1.3B-Diffusers", "Wan2.2-T2V-A14B-Diffusers", "Wan2.2-TI2V-5B-Diffusers"
I2V_720P = "Wan2.1-I2V-14B-720P-Diffusers"
PUBLISHED_HASHES = {
    (T2V, "model_index.json"): "b8b28e022329acf975e027579a1d2dc3de44dba28f4c909b98a880fbf5b0de7d",
    (T2V, "scheduler/scheduler_config.json"): "3fed2abbd9bbc301a74db01947198057ec5049808910dccab320925bf27bea6e",
    (T2V, "text_encoder/config.json"): "4087b6192155a4643f6d29fd326c4610103130674011ef4d0a53f8bce5de967d",
    (T2V, "text_encoder/model.safetensors.index.json"): (
        "8af791f24a6447aa30c95786f40adf23d3c9df97470d2f36159c8f1113f120b4"
    ),
    (T2V, "transformer/config.json"): "0b093fa072e9ff28763febe9b964ee582f566733a6d6709deb9dfba1bde16b81",
    (T2V, "transformer/diffusion_pytorch_model.safetensors.index.json"): (
        "dcbcf3497134a3f50557ff069dd7d2c84b5c4d8c5932472f6bdb780fb4016589"
    ),
    (T2V, "vae/config.json"): "f0c1cc1d7decb5badc384f54691746a27a9aeff49f7ebca974e583389342d527",
    (TI2V, "model_index.json"): "fe52bfbdc8e5bbc8a6a607dd301f6e1ab0889cd1",
    (TI2V, "scheduler/scheduler_config.json"): "950d26faea717c8902ee197982026cb9c1b6463e",
    (TI2V, "text_encoder/config.json"): "ab4a73bce055c6e32e66133032dcb3adfb26ee8d",
    (TI2V, "text_encoder/model.safetensors.index.json"): "f3d3d4da90eb33e14c92d88ea346370fa3c0b5b2",
    (TI2V, "transformer/config.json"): "8180887e8ed86e4fd842824fb15fcabf43d19512",
    (TI2V, "vae/config.json"): "29f65bc63e9daadb95e4c1a8344d162be4b7d533",
}
_MIDDLE_SHARDS = [4919594456, 4919465128, 4919594536, 4919465224, *[4919594552, 4919465224] * 3]
PUBLISHED_SIZES = {
    (T2V, "transformer"): [4998781576, 677289072],
    (T2V, "text_encoder"): [4972389712, 4899225672, 4966309504, 4999880704, 2885866152],
    (T2V, "vae"): [507591892],
    (A14B, "transformer"): [4863171808, *_MIDDLE_SHARDS, 3095607280],
    (A14B, "transformer_2"): [4863171808, *_MIDDLE_SHARDS, 3095607280],
    (A14B, "text_encoder"): [4935812536, 4983103192, 1442935480],
    (A14B, "vae"): [507591892],
    (TI2V, "text_encoder"): [4935812536, 4983103192, 1442935480],
    (TI2V, "vae"): [2818777808],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of each name."""
    root = tmp_path_factory.mktemp("published")
    for name in FOLDERS:
        write_published_folder(root / name, name)
    return root


def test_json_files_are_those_of_the_hub_byte_by_byte(folders):
    def compute_hash(content, like):
        is_blob = len(like) == 40
        prefix = b"blob %d\0" % len(content) if is_blob else b""
        return hashlib.new("sha1" if is_blob else "sha256", prefix + content).hexdigest()

    for (name, file), expected in PUBLISHED_HASHES.items():
        assert compute_hash((folders / name / file).read_bytes(), expected) == expected, (name, file)


def test_weight_files_have_the_sizes_of_the_hub_and_take_no_room(folders):
    """The sizes hold the names, too, which are in the headers."""
    files = {key: sorted((folders / key[0] / key[1]).glob("*.safetensors")) for key in PUBLISHED_SIZES}
    assert {key: [path.stat().st_size for path in paths] for key, paths in files.items()} == PUBLISHED_SIZES
    assert sum(path.stat().st_blocks * 512 for path in folders.rglob("*.safetensors")) < 10_000_000


@pytest.mark.parametrize("name", mark_slow_except([T2V, A14B, TI2V], FOLDERS))
def test_every_tensor_and_setting_of_a_published_folder_is_known(folders, name):
    folder = folders / name
    family = find_family(folder)
    parts = family.read_parts(folder)
    denoisers = sorted(path.name for path in folder.glob("transformer*"))
    assert (parts.boundary is not None) == (len(denoisers) == 2)
    family.check_weights(folder, text=parts.text, image_encoder=parts.image_encoder, boundary=parts.boundary)


def test_configs_of_published_folders_are_those_of_the_models(folders):
    def read(name):
        return find_family(folders / name).read_parts(folders / name)

    image, ends, token = (read(name) for name in (*list(FOLDERS)[2:5:2], TI2V))
    assert (image.denoiser.channels, image.denoiser.cond_channels, image.denoiser.image_width) == (16, 20, 1280)
    assert (image.denoiser.image_positions, ends.denoiser.image_positions) == (None, 514)
    assert (token.denoiser.time, token.denoiser.channels, token.autoencoder.stride) == ("token", 48, (4, 16, 16))
    assert read(A14B).boundary == 0.875


# Defaults.


@pytest.mark.parametrize(
    ("name", "size", "fps", "steps", "guidance", "shift", "negative"),
    [
        (T2V, (81, 480, 832), 16, 50, 6.0, 8.0, NEGATIVE),
        ("Wan2.1-T2V-14B-Diffusers", (81, 720, 1280), 16, 50, 5.0, 5.0, NEGATIVE),
        ("Wan2.1-I2V-14B-480P-Diffusers", (81, 480, 832), 16, 40, 5.0, 3.0, f"镜头晃动，{NEGATIVE}"),
        (I2V_720P, (81, 720, 1280), 16, 40, 5.0, 5.0, f"镜头晃动，{NEGATIVE}"),
        ("Wan2.1-FLF2V-14B-720P-diffusers", (81, 720, 1280), 16, 50, 5.0, 16.0, f"镜头切换，镜头晃动，{NEGATIVE}"),
        ("Wan2.1-VACE-1.3B-diffusers", (81, 480, 832), 16, 50, 5.0, 16.0, NEGATIVE),
        ("Wan2.1-VACE-14B-diffusers", (81, 720, 1280), 16, 50, 5.0, 16.0, NEGATIVE),
        (A14B, (81, 720, 1280), 16, 40, (4.0, 3.0), 12.0, NEGATIVE),
        ("Wan2.2-I2V-A14B-Diffusers", (81, 720, 1280), 16, 40, (3.5, 3.5), 5.0, NEGATIVE),
        (TI2V, (121, 704, 1280), 24, 50, 5.0, 5.0, NEGATIVE),
    ],
)
def test_defaults_of_a_published_folder_are_its_authors(folders, name, size, fps, steps, guidance, shift, negative):
    folder = folders / name
    config = find_family(folder).make_config(folder, LoadOptions())
    assert (config.size, config.fps, config.sampling.steps, config.sampling.guidance.scales["text"]) == (
        size,
        fps,
        steps,
        guidance,
    )
    assert (config.model.process.shift, config.negative) == (shift, negative)


def test_the_negative_prompt_is_that_of_the_authors_letter_by_letter():
    """The hash is that of `sample_neg_prompt` in `wan/configs/shared_config.py` of Wan-Video/Wan2.1 and Wan2.2."""
    digest = hashlib.sha256(NEGATIVE.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def test_a_folder_keeps_a_shift_that_was_changed_and_an_unknown_model_has_the_defaults_of_diffusers(folders):
    backbone = find_family(folders / A14B).read_parts(folders / A14B).denoiser
    changed = find_defaults(backbone, experts=2, flow_shift=7.0)
    assert (changed.shift, changed.steps, changed.guidance) == (None, 40, (4.0, 3.0))
    image = find_family(folders / I2V_720P).read_parts(folders / I2V_720P).denoiser
    published = find_defaults(image, experts=1, flow_shift=5.0)
    # With the shift that diffusers' script writes, only the name tells the model from that for 480p.
    assert find_defaults(image, experts=1, flow_shift=3.0, name=f"snapshots/{I2V_720P}/12ab") == published
    assert find_defaults(image, experts=1, flow_shift=7.0, name=I2V_720P) == published._replace(shift=None)
    unknown = find_defaults(replace(backbone, layers=41), experts=2, flow_shift=3.0)
    assert unknown == ((81, 480, 832), 50, 5.0, None, "")


# Tensors and settings that the models do not use.


def add_tensor(path, name):
    """Add a tensor to a small file of weights."""
    save(path, load(path, dtype=None) | {name: np.ones(16, np.float32)})


@pytest.mark.nightly
def test_an_image_to_video_folder_with_its_unused_norms_loads(tmp_path):
    write_animating_wan(tmp_path / "wan")
    transformer = tmp_path / "wan" / "transformer"
    _, params = load_denoiser(transformer)
    path = transformer / "diffusion_pytorch_model.safetensors"
    for layer in range(2):
        add_tensor(path, f"blocks.{layer}.attn2.norm_added_q.weight")
    loaded = dit_video.load(tmp_path / "wan", dtype="float32").denoiser_params["backbone"]
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    convert(transformer, tmp_path / "native", layout="dit_video")
    jax.tree.map(np.testing.assert_array_equal, load_denoiser(tmp_path / "native")[1], params)
    add_tensor(path, "blocks.0.attn2.norm_added_v.weight")
    with pytest.raises(UserError, match=r"1 unexpected \(blocks\.0\.attn2\.norm_added_v\.weight\)"):
        dit_video.load(tmp_path / "wan")


def test_a_setting_without_effect_is_read_and_unknown_ones_are_refused(tmp_path):
    write_wan(tmp_path / "wan")
    path = tmp_path / "wan" / "vae" / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"clip_output": False}))
    assert dit_video.load(tmp_path / "wan").config.model.autoencoder.stride == (4, 4, 4)
    path.write_text(json.dumps(document | {"clip_input": False}))
    with pytest.raises(UserError, match="settings that are not supported: clip_input"):
        dit_video.load(tmp_path / "wan")


# Folders that are incomplete: said before any weight is read.


@pytest.fixture
def unread(monkeypatch):
    """Let any attempt to read weights fail."""

    def read(self, *_):
        raise AssertionError(f"weights of {self.folder} are read")

    monkeypatch.setattr("dit_video.weights.folders.TensorFolder.read", read)
    monkeypatch.setattr("dit_video.weights.folders.TensorFolder.read_row", read)
    monkeypatch.setattr("dit_video.weights.folders.TensorFolder.read_chunks", read)


@pytest.mark.parametrize(
    "file",
    [
        "transformer_2/diffusion_pytorch_model-00007-of-00012.safetensors",
        "text_encoder/model-00002-of-00003.safetensors",
    ],
)
def test_a_missing_shard_is_named_before_weights_are_read(folders, unread, file):
    path = folders / A14B / file
    moved = path.rename(folders / "moved")
    try:
        with pytest.raises(MissingError, match=rf"lacks 1 of .*index\.json lists \({path.name}\)\. Copy or download"):
            dit_video.load(folders / A14B)
    finally:
        moved.rename(path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_an_interrupted_download_is_named_before_weights_are_read(folders, unread, tmp_path, part):
    folder = tmp_path / "wan"
    write_published_folder(folder, T2V)
    path = sorted((folder / part).glob("*.safetensors"))[-1]
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(size // 2)
    message = rf"{path.name} is not a complete .* has {size // 2} of the {size} bytes .* Copy or download it again"
    with pytest.raises(UserError, match=message):
        dit_video.load(folder)


def test_a_pointer_of_git_lfs_is_named(unread, tmp_path):
    write_wan(tmp_path, **TWO)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    with pytest.raises(MissingError, match=r"a pointer of Git LFS, without the weights\. Use git lfs pull"):
        dit_video.load(tmp_path)
