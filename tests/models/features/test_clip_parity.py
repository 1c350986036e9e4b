"""Both towers, their weights and their images equal those of `transformers`, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.models.features import ClipImageProcessor, FrameEncoder
from dit_video.models.features.clip import preprocess_frames
from dit_video.nn import get_graph_def
from dit_video.weights import (
    load_clip,
    load_clip_image_processor,
    load_clip_text,
    load_clip_vision,
    load_embedder,
    save_clip,
    save_clip_image_processor,
)
from support import tiny_clip

pytestmark = pytest.mark.parity

TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 12,
    "projection_dim": 10,
    "bos_token_id": 50,
    "eos_token_id": 51,
    "layer_norm_eps": 1e-4,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 5,
    "projection_dim": 10,
    "hidden_act": "gelu",
}
LENGTHS = (12, 5, 2, 9)
MASK = np.arange(12) < np.asarray(LENGTHS)[:, None]
IDS = np.random.default_rng(0).integers(1, 50, (4, 12))
IDS[:, 0] = 50
IDS[np.arange(4), np.asarray(LENGTHS) - 1] = 51
IDS = np.where(MASK, IDS, 51)  # padded as CLIP's tokenizer does, with more end tokens
IMAGES = np.random.default_rng(1).normal(size=(3, 20, 20, 3)).astype(np.float32)


def random_model(name, config):
    """Return a torch model without zeros and ones among its weights."""
    import torch
    import transformers

    model = getattr(transformers, name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in path and path.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif path == "logit_scale":
                value.fill_(2.3)
            else:
                linear = value.ndim == 2 and "embedding" not in path
                value.copy_(noise / value.shape[1] ** 0.5 if linear else 0.5 * noise)
    return model.eval()


@pytest.fixture(scope="module", params=["CLIPTextModel", "CLIPTextModelWithProjection", "of before 2023", "gelu"])
def text(request):
    import transformers

    changes = {"of before 2023": {"eos_token_id": 2}, "gelu": {"hidden_act": "gelu"}}.get(request.param, {})
    name = "CLIPTextModelWithProjection" if changes else request.param
    return random_model(name, transformers.CLIPTextConfig(**TEXT | changes))


@pytest.fixture(scope="module", params=["CLIPVisionModel", "CLIPVisionModelWithProjection", "quick gelu"])
def vision(request):
    import transformers

    changes = {"quick gelu": {"hidden_act": "quick_gelu"}}.get(request.param, {})
    name = "CLIPVisionModelWithProjection" if changes else request.param
    return random_model(name, transformers.CLIPVisionConfig(**VISION | changes))


@pytest.fixture(scope="module")
def both_towers():
    import transformers

    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=14)
    return random_model("CLIPModel", config)


def write_folder(model, tmp_path):
    """Write the model with `transformers` in several files, and return the folder."""
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def features(loaded, *inputs):
    graph = get_graph_def(loaded.config.make)
    return jax.jit(lambda params, inputs: nnx.merge(graph, params)(*inputs))(loaded.params, inputs)


def text_features(loaded, ids=IDS, mask=MASK):
    return features(loaded, jnp.asarray(ids, jnp.int32), jnp.asarray(mask, jnp.int32))


def compute_torch_features(model, **inputs):
    """Return the states of all layers, the last ones, and the pooled and projected ones."""
    import torch

    arrays = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**arrays, output_hidden_states=True)
        inner = getattr(model, "text_model", getattr(model, "vision_model", model))
        pooled = inner(**arrays).pooler_output
    projected = getattr(output, "text_embeds", getattr(output, "image_embeds", None))
    return output.last_hidden_state, output.hidden_states[-2], pooled, projected


def pixels(images=IMAGES):
    return images.transpose(0, 3, 1, 2)


def assert_equal(ours, theirs, seen=slice(None)):
    last, before, pooled, projected = theirs
    for own, other in ((ours.values, last), (ours.penultimate, before)):
        assert np.std(other.numpy()) > 0.3
        np.testing.assert_allclose(np.asarray(own)[seen], other.numpy()[seen], atol=1e-5)
    np.testing.assert_allclose(ours.pooled, pooled.numpy(), atol=1e-5)
    assert (ours.projected is None) == (projected is None)
    if projected is not None:
        np.testing.assert_allclose(ours.projected, projected.numpy(), atol=1e-5)


def test_text_features_equal_those_of_transformers(text, tmp_path):
    loaded = load_clip_text(write_folder(text, tmp_path))
    assert_equal(
        text_features(loaded),
        compute_torch_features(text, input_ids=IDS, attention_mask=MASK.astype(np.int64)),
        seen=MASK,
    )
    # As diffusers' pipelines do: padding is not masked.
    assert_equal(text_features(loaded, mask=np.ones_like(MASK)), compute_torch_features(text, input_ids=IDS))
    # Padding in front, which no token sees, and where no text ends.
    ids, mask = np.where(MASK, IDS, 1)[1:2], MASK[1:2]
    ids, mask = np.roll(ids, 7, axis=1), np.roll(mask, 7, axis=1)
    theirs = compute_torch_features(text, input_ids=ids, attention_mask=mask.astype(np.int64))
    assert_equal(text_features(loaded, ids, mask), theirs, seen=mask)


def test_image_features_equal_those_of_transformers(vision, tmp_path):
    loaded = load_clip_vision(write_folder(vision, tmp_path))
    assert_equal(features(loaded, jnp.asarray(IMAGES)), compute_torch_features(vision, pixel_values=pixels()))


def test_similarities_equal_those_of_transformers(both_towers, tmp_path):
    import torch

    loaded = load_clip(write_folder(both_towers, tmp_path))
    graph = get_graph_def(loaded.config.make)

    @jax.jit
    def similarity(params):
        clip = nnx.merge(graph, params)
        texts = clip.text(jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK, jnp.int32)).projected
        return clip.similarity(texts, clip.vision(jnp.asarray(IMAGES)).projected)

    with torch.no_grad():
        theirs = both_towers(
            input_ids=torch.from_numpy(IDS),
            attention_mask=torch.from_numpy(MASK.astype(np.int64)),
            pixel_values=torch.from_numpy(pixels().copy()),
        )
    assert np.std(theirs.logits_per_text.numpy()) > 0.3
    np.testing.assert_allclose(similarity(loaded.params), theirs.logits_per_text.numpy(), atol=2e-5)


def test_one_tower_of_a_folder_of_both_can_be_loaded(both_towers, tmp_path):
    import torch

    folder = write_folder(both_towers, tmp_path)
    text, vision = load_clip_text(folder), load_clip_vision(folder)
    assert all(name.startswith(("vision_model.", "visual_projection.", "logit_scale")) for name in text.ignored)
    assert all(name.startswith(("text_model.", "text_projection.", "logit_scale")) for name in vision.ignored)
    with torch.no_grad():
        texts = both_towers.get_text_features(
            torch.from_numpy(IDS), torch.from_numpy(MASK.astype(np.int64))
        ).pooler_output
        images = both_towers.get_image_features(torch.from_numpy(pixels().copy())).pooler_output
    np.testing.assert_allclose(text_features(text).projected, texts.numpy(), atol=1e-5)
    np.testing.assert_allclose(features(vision, jnp.asarray(IMAGES)).projected, images.numpy(), atol=1e-5)


def test_gradients_equal_those_of_torch(both_towers, tmp_path):
    import torch

    loaded = load_clip(write_folder(both_towers, tmp_path))
    graph = get_graph_def(loaded.config.make)
    weights = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)

    @jax.jit
    def gradient(params):
        def loss(params):
            clip = nnx.merge(graph, params)
            texts = clip.text(jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK, jnp.int32)).projected
            return (clip.similarity(texts, clip.vision(jnp.asarray(IMAGES)).projected) * weights).sum()

        return jax.grad(loss)(params)

    both_towers.zero_grad()
    output = both_towers(
        input_ids=torch.from_numpy(IDS),
        attention_mask=torch.from_numpy(MASK.astype(np.int64)),
        pixel_values=torch.from_numpy(pixels().copy()),
    )
    (output.logits_per_text * torch.from_numpy(weights)).sum().backward()
    folder = tmp_path / "gradients"
    save_clip(folder, loaded.config, jax.tree.map(np.asarray, gradient(loaded.params)))
    ours = read_tensors(folder)
    for name, value in both_towers.named_parameters():
        theirs, largest = value.grad.numpy(), np.abs(value.grad.numpy()).max()
        # A bias of keys moves all scores of a query alike: its gradient is zero but for rounding.
        tolerance = 1e-4 if "k_proj.bias" in name else 1e-4 * largest
        assert largest > 1e-3 or "k_proj.bias" in name, name
        np.testing.assert_allclose(ours[name], theirs, atol=tolerance, err_msg=name)


def read_tensors(folder):
    import safetensors.numpy

    return {
        name: value
        for file in folder.glob("model*.safetensors")
        for name, value in safetensors.numpy.load_file(file).items()
    }


def assert_goes_back(model, load, tmp_path):
    import torch

    loaded = load(write_folder(model, tmp_path))
    save_clip(tmp_path / "back", loaded.config, loaded.params, shard_bytes=20_000)
    again = type(model).from_pretrained(tmp_path / "back")
    for (name, ours), (other, theirs) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name
    back = load(tmp_path / "back")
    assert (back.config, back.digest) == (loaded.config, loaded.digest)


def test_text_towers_are_exported_bit_for_bit(text, tmp_path):
    assert_goes_back(text, load_clip_text, tmp_path)


def test_image_towers_are_exported_bit_for_bit(vision, tmp_path):
    assert_goes_back(vision, load_clip_vision, tmp_path)


def test_models_of_both_towers_are_exported_bit_for_bit(both_towers, tmp_path):
    assert_goes_back(both_towers, load_clip, tmp_path)


PREPARED = {
    "as trained": ({}, (50, 90)),
    "portrait, larger": ({"size": {"shortest_edge": 24}, "crop_size": 20}, (37, 13)),
    "odd crop": ({"size": {"shortest_edge": 24}, "crop_size": {"height": 21, "width": 15}}, (40, 51)),
    "squashed": ({"size": {"height": 20, "width": 20}, "do_center_crop": False}, (50, 90)),
    "crop alone": ({"do_resize": False, "crop_size": 20}, (50, 91)),
    "other colours": ({"crop_size": 20, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}, (30, 30)),
    "plain colours": ({"crop_size": 20, "do_normalize": False}, (30, 30)),
}


@pytest.mark.parametrize(("settings", "size"), PREPARED.values(), ids=PREPARED)
def test_prepared_frames_equal_those_of_the_image_processor(settings, size, tmp_path):
    import transformers

    frames = np.random.default_rng(3).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil(**settings)
    processor.save_pretrained(tmp_path)
    images = load_clip_image_processor(tmp_path)
    theirs = np.stack(processor(list(frames), return_tensors="np").pixel_values).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(preprocess_frames(frames, images), theirs, atol=1e-5)
    save_clip_image_processor(tmp_path / "back", images)
    again = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(
        np.stack(again(list(frames), return_tensors="np").pixel_values).transpose(0, 2, 3, 1), theirs
    )


def test_image_tokens_are_those_of_wan(tmp_path):
    """The tokens are those of diffusers' pipeline, loaded from its folder."""
    import diffusers
    import transformers
    from PIL import Image

    model = random_model("CLIPVisionModel", transformers.CLIPVisionConfig(**VISION))
    model.save_pretrained(tmp_path / "image_encoder")
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=20)
    processor.save_pretrained(tmp_path / "image_processor")
    parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler", "transformer"))
    pipe = diffusers.WanImageToVideoPipeline(**parts, image_encoder=model, image_processor=processor)
    frames = np.random.default_rng(4).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)
    theirs = pipe.encode_image([Image.fromarray(frame) for frame in frames], "cpu").detach().numpy()
    loaded = load_clip_vision(tmp_path)
    encode = FrameEncoder(
        loaded.config, loaded.params, load_clip_image_processor(tmp_path), feature="penultimate", batch=2
    )
    assert theirs.shape == (5, loaded.config.tokens, 24)
    np.testing.assert_allclose(encode(frames), theirs, atol=1e-5)
    assert (
        load_clip_image_processor(tmp_path / "image_encoder")
        == load_clip_image_processor(tmp_path)
        == ClipImageProcessor(resize=20, crop=(20, 20))
    )


def test_texts_are_embedded_as_pipelines_do(tmp_path):
    """Texts are padded to the whole length with end tokens, which no token of the text sees."""
    import torch
    import transformers

    config = transformers.CLIPTextConfig(**TEXT | {"vocab_size": 80, "eos_token_id": tiny_clip.END})
    model = random_model("CLIPTextModel", config)
    model.save_pretrained(tmp_path / "text_encoder")
    tiny_clip.write_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = ["Red ball", "", "a cube left of a ball and more"]
    ids = tokenizer(texts, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = model(ids)
    with pytest.warns(UserWarning, match="is cut to 12"):
        ours = load_embedder(tmp_path).embed_many(texts)
    assert [len(value) for value in ours] == [4, 2, 12]
    for value, states, pooled in zip(ours, theirs.last_hidden_state.numpy(), theirs.pooler_output.numpy(), strict=True):
        np.testing.assert_allclose(value, states[: len(value)], atol=1e-5)
        np.testing.assert_allclose(value[-1], pooled, atol=1e-5)
