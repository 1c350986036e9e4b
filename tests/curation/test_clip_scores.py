"""Scores by CLIP: embeddings, the match of captions, aesthetic heads in their published layouts, near-duplicates."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.curation.annotate import annotate, annotate_table
from dit_video.curation.clip_scores import THUMBNAIL_SIDE, ClipScores, load_aesthetic_head, normalize
from dit_video.curation.near_duplicates import Duplicates, to_matrix
from dit_video.data.tables import Table
from dit_video.models.features import ClipImageProcessor
from dit_video.video import Clip, decode, encode
from dit_video.weights import save, save_clip_image_processor
from support import tiny_clip
from support.annotated_clips import make_clip, open_clips

WIDTHS = (6, 5, 4, 3, 2, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    tiny_clip.write_clip(path)
    tiny_clip.write_tokenizer(path)
    size = tiny_clip.VISION.size
    save_clip_image_processor(path, ClipImageProcessor(resize=size, crop=(size, size)))
    return path


def make_head(numbers, prefix="layers."):
    generator = np.random.default_rng(0)
    tensors = {}
    for number, (inputs, outputs) in zip(numbers, itertools.pairwise(WIDTHS), strict=True):
        tensors[f"{prefix}{number}.weight"] = generator.normal(size=(outputs, inputs)).astype(np.float32)
        tensors[f"{prefix}{number}.bias"] = generator.normal(size=outputs).astype(np.float32)
    return tensors


@pytest.mark.parametrize("prefix", ["layers.", "model.layers."])
@pytest.mark.parametrize(("numbers", "has_relu"), [((0, 2, 4, 6, 7), False), ((0, 3, 6, 9, 11), True)])
def test_heads_of_several_layers_are_read(numbers, has_relu, prefix, tmp_path):
    tensors = make_head(numbers, prefix)
    save(tmp_path / "head.safetensors", tensors | {"vision_model.post_layernorm.weight": np.ones(3, np.float32)})
    head = load_aesthetic_head(tmp_path / "head.safetensors")
    assert (head.width, head.has_relu) == (6, has_relu)
    rows = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    x = rows
    for number in numbers:
        x = np.maximum(x, 0) if has_relu and number else x
        x = x @ tensors[f"{prefix}{number}.weight"].T + tensors[f"{prefix}{number}.bias"]
    np.testing.assert_allclose(head(rows), x[:, 0], rtol=1e-5)


@pytest.mark.parametrize("prefix", ["", "predictor."])
def test_linear_heads_are_read(prefix, tmp_path):
    weight = np.arange(6, dtype=np.float32)[None]
    save(tmp_path / "head.safetensors", {f"{prefix}weight": weight, f"{prefix}bias": np.array([5.0], np.float32)})
    head = load_aesthetic_head(tmp_path / "head.safetensors")
    np.testing.assert_allclose(head(np.eye(6, dtype=np.float32)), 5 + np.arange(6))


BROKEN = {"layers.7.weight": np.ones((2, 2), np.float32)}


@pytest.mark.parametrize("tensors", [{"other": np.ones(3, np.float32)}, make_head((0, 2, 4, 6, 7)) | BROKEN])
def test_a_file_without_a_head_is_refused(tensors, tmp_path):
    save(tmp_path / "head.safetensors", tensors)
    with pytest.raises(UserError, match=r"head\.safetensors holds no aesthetic head.*sac\+logos\+ava1-l14-linearMSE"):
        load_aesthetic_head(tmp_path / "head.safetensors")
    with pytest.raises(MissingError):
        load_aesthetic_head(tmp_path / "absent.safetensors")


@pytest.mark.slow
def test_columns_are_the_embedding_the_match_and_the_score(folder, tmp_path):
    save(tmp_path / "head.safetensors", make_head((0, 2, 4, 6, 7)))
    contents = {f"{number}.mp4": make_clip(number) for number in range(3)}
    source = open_clips(tmp_path / "data", contents, {"0.mp4": ("red ball", "cube"), "1.mp4": ("cube",)})
    annotator = ClipScores(folder=str(folder), aesthetic=str(tmp_path / "head.safetensors"), frames=4)
    assert annotate(source, annotator).failures == {}
    table = Table(tmp_path / "data")
    embeddings = to_matrix(table.arrow("embedding"))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)
    assert np.isfinite(table["aesthetic"]).all()
    # The best caption counts, and a clip without captions has no match.
    cosines = [ClipScores(folder=str(folder)).annotate(each)["text_match"] for each in pairs(source, contents)]
    np.testing.assert_allclose(table["text_match"][0], max(cosines), rtol=1e-3)
    assert np.isnan(table["text_match"][2])


def pairs(source, contents):
    """Return the first clip with either of its captions."""
    from dit_video.curation.annotator import ClipFile

    info = source.infos[0]
    return [ClipFile(info._replace(captions=(text,)), contents["0.mp4"]) for text in info.captions]


def test_a_head_of_another_clip_is_refused(folder, tmp_path):
    save(tmp_path / "head.safetensors", {"weight": np.ones((1, 768), np.float32), "bias": np.ones(1, np.float32)})
    with pytest.raises(UserError, match=r"768 numbers.*makes 6.*head of this CLIP"):
        ClipScores(folder=str(folder), aesthetic=str(tmp_path / "head.safetensors")).check()
    with pytest.raises(MissingError, match="absent"):
        ClipScores(folder=str(tmp_path / "absent")).check()


@pytest.mark.nightly
def test_trimmed_mirrored_and_re_encoded_clips_are_found_and_second_takes_kept(folder, tmp_path):
    def move(seed, start, step):
        generator = np.random.default_rng(seed)
        picture = np.kron(generator.integers(0, 255, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        frames = np.repeat(picture[None] // 2, 20, axis=0)
        for number, frame in enumerate(frames):
            column = start + step * number
            frame[8:24, column : column + 12] = (250, 240, 30)
        return Clip(frames=frames, fps=10)

    clip = move(0, 2, 1)
    edits = {
        "original": clip,
        "trimmed": Clip(frames=clip.frames[4:], fps=10),
        "mirrored": Clip(frames=np.ascontiguousarray(clip.frames[:, :, ::-1]), fps=10),
        "take": move(0, 34, -1),
        "other": move(1, 2, 1),
    }
    contents = {f"{name}.mp4": encode(each, "mp4", crf=18) for name, each in edits.items()}
    contents["re-encoded.mp4"] = encode(decode(contents["original.mp4"]), "mp4", crf=34)
    # The original is at row 0.
    source = open_clips(tmp_path, contents)
    annotate(source, ClipScores(folder=str(folder)))
    annotate_table(open_clips(tmp_path, contents), Duplicates(threshold=0.5))
    matches = dict(zip(contents, Table(tmp_path).arrow("near_duplicate_of").to_pylist(), strict=True))
    copies = {name for name, match in matches.items() if match == "original.mp4"}
    assert copies >= {"trimmed.mp4", "mirrored.mp4", "re-encoded.mp4"}
    assert matches["other.mp4"] is None


def test_thumbnails_are_bytes_without_a_limit_of_32_bit_offsets(folder, tmp_path):
    contents = {"0.mp4": make_clip(0)}
    annotate(open_clips(tmp_path, contents), ClipScores(folder=str(folder)))
    column = Table(tmp_path).arrow("thumbnails")
    assert column.type == pa.large_binary()
    assert len(column[0].as_py()) == 8 * THUMBNAIL_SIDE**2  # a clip of 8 frames


def test_lists_of_thumbnails_are_to_be_computed_again():
    columns = {
        "embedding": pa.chunked_array([pa.array([[1.0, 0.0]], pa.list_(pa.float16(), 2))]),
        "thumbnails": pa.chunked_array([pa.array([[0] * 256], pa.list_(pa.uint8()))]),
    }
    with pytest.raises(UserError, match=r"older version.*annotate\.py DATA clip"):
        Duplicates().annotate_table(["0.mp4"], columns)


def test_a_clip_without_thumbnails_duplicates_none():
    frames = np.random.default_rng(0).integers(0, 255, (2, THUMBNAIL_SIDE, THUMBNAIL_SIDE)).astype(np.uint8).tobytes()
    columns = {
        "embedding": pa.chunked_array([pa.array([[1.0, 0.0]] * 3 + [None], pa.list_(pa.float16(), 2))]),
        "thumbnails": pa.chunked_array([pa.array([frames, None, frames, None], pa.large_binary())]),
    }
    values = Duplicates().annotate_table(["a", "b", "c", "d"], columns)
    assert values["near_duplicate_of"] == [None, None, "a", None]
    assert values["near_duplicate_similarity"].to_pylist() == [None, None, 1.0, None]


def test_vectors_are_normalized():
    np.testing.assert_allclose(normalize(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)), [[0.6, 0.8], [0, 0]])
