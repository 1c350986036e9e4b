"""Encoders, tokenizer and cleaning equal those of `transformers` and of diffusers' Wan pipeline, on random weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_video.models.encoders import clean
from dit_video.models.encoders.t5 import compute_relative_buckets
from dit_video.nn import get_graph_def
from dit_video.weights import load_embedder, load_text_encoder, save_text_encoder
from support.tiny_t5 import write_tokenizer

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 64,
    "d_model": 24,
    "d_kv": 4,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 5,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 1e-5,
}
KINDS = {
    "umt5": ("UMT5", {"feed_forward_proj": "gated-gelu"}),
    "umt5 ungated": ("UMT5", {"feed_forward_proj": "relu"}),
    "t5 v1.1": ("T5", {"feed_forward_proj": "gated-gelu"}),
    "t5 v1.0": ("T5", {"feed_forward_proj": "relu"}),
    "t5 with the usual buckets": ("T5", {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
}
LENGTHS = (40, 7, 1, 23)
IDS = np.random.default_rng(0).integers(2, 64, (len(LENGTHS), max(LENGTHS)))
MASK = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]


def random_model(kind):
    """Return a model of torch without parameters that are zero or one."""
    import torch
    import transformers

    name, choices = KINDS[kind]
    model = getattr(transformers, f"{name}EncoderModel")(getattr(transformers, f"{name}Config")(**SIZES | choices))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "layer_norm" in path:
                value.copy_(1 + 0.2 * noise)
            else:
                value.copy_(
                    noise if value.ndim < 2 or "bias" in path or "shared" in path else noise / value.shape[1] ** 0.5
                )
    return model.eval()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_model(request.param)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Return the folder that `transformers` writes, in several files."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def compute_states(model, dtype="float32"):
    import torch

    model = copy.deepcopy(model).to(getattr(torch, dtype))
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK.astype(np.int64)))
    return output.last_hidden_state.float().numpy()


def encode(loaded, ids, segments):
    graph = get_graph_def(loaded.config.make)
    run = jax.jit(lambda params, ids, segments: nnx.merge(graph, params)(ids, segments).values)
    return np.asarray(run(loaded.params, jnp.asarray(ids, jnp.int32), jnp.asarray(segments, jnp.int32)))


def test_padded_rows_equal_transformers(model, folder):
    ours, theirs = encode(load_text_encoder(folder), IDS, MASK), compute_states(model)
    assert np.std(theirs[MASK]) > 0.5
    np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=1e-5)


def test_packed_rows_equal_transformers_one_by_one(model, folder):
    import torch

    ids = np.concatenate([IDS[MASK], [5, 6, 7]])[None]
    segments = np.concatenate([np.repeat(np.arange(len(LENGTHS)) + 1, LENGTHS), [0, 0, 0]])[None]
    values = encode(load_text_encoder(folder), ids, segments)[0]
    for index, length in enumerate(LENGTHS):
        with torch.no_grad():
            alone = model(input_ids=torch.from_numpy(IDS[index : index + 1, :length])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(values[segments[0] == index + 1], alone, atol=1e-5)


def test_gradients_equal_transformers(model, folder):
    import torch

    loaded = load_text_encoder(folder)
    graph, weight = get_graph_def(loaded.config.make), np.random.default_rng(1).normal(size=(*IDS.shape, 24))
    weight = (weight * MASK[..., None]).astype(np.float32)

    @jax.jit
    def gradient(params):
        def loss(params):
            return (
                nnx.merge(graph, params)(jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK, jnp.int32)).values * weight
            ).sum()

        return jax.grad(loss)(params)

    model.zero_grad()
    output = model(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK.astype(np.int64)))
    (output.last_hidden_state * torch.from_numpy(weight)).sum().backward()
    state = {name: value.grad for name, value in model.named_parameters()}
    gradients, block = gradient(loaded.params), "encoder.block.1.layer."
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    first = gradients["position"]["table"] if "position" in gradients else gradients["blocks"]["position"]["table"][0]
    pairs = {
        "shared.weight": gradients["embedding"],
        "encoder.final_layer_norm.weight": gradients["norm"]["scale"],
        f"{block}0.SelfAttention.q.weight": gradients["blocks"]["query"]["kernel"][1].T,
        f"{block}1.DenseReluDense.wo.weight": gradients["blocks"]["down"]["kernel"][1].T,
        table: first,
    }
    for name, ours in pairs.items():
        theirs = state[name].numpy()
        assert np.abs(theirs).max() > 1e-2, name
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), err_msg=name)


def test_bfloat16_is_as_close_as_torchs(model, folder):
    exact = compute_states(model)[MASK]
    ours = encode(load_text_encoder(folder, dtype="bfloat16"), IDS, MASK)[MASK]
    theirs = compute_states(model, "bfloat16")[MASK]
    error, usual = np.abs(ours - exact), np.abs(theirs - exact)
    assert 1e-3 < error.mean() < usual.mean()
    assert error.max() < 2 * usual.max()  # the largest of many roundings varies with the instructions of the CPU


def test_files_go_back_bit_exact(model, folder, tmp_path):
    import torch

    loaded = load_text_encoder(folder)
    save_text_encoder(tmp_path, loaded.config, loaded.params)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.model_type == model.config.model_type
    for (name, ours), (other, theirs) in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs), name
    np.testing.assert_array_equal(compute_states(again), compute_states(model))


def test_the_encoder_of_an_encoder_decoder_model_is_read(tmp_path):
    import transformers

    whole = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES, decoder_start_token_id=0)).eval()
    whole.save_pretrained(tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert loaded.ignored
    assert all(name.startswith(("decoder.", "lm_head.")) for name in loaded.ignored)
    ours, theirs = encode(loaded, IDS, MASK), compute_states(whole.get_encoder())
    np.testing.assert_allclose(ours[MASK], theirs[MASK], atol=1e-5)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 12), (64, 512), (16, 64), (4, 3), (10, 100)])
def test_buckets_equal_transformers(buckets, distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    theirs = T5Attention._relative_position_bucket(offset, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(compute_relative_buckets(600, buckets=buckets, max_distance=distance), theirs.numpy())


TEXTS = ["a  red ball &amp; a green cube", "", "moves left " * 40, "\u3000the table\n"]


def test_prompts_are_cleaned_as_wan_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in [*TEXTS, "&amp;lt;b&amp;gt; x", "&nbsp; y \u2028z", "a &amp;amp; b"]:
        assert clean(text) == prompt_clean(text)


@pytest.mark.filterwarnings("ignore:a text of")
def test_texts_are_embedded_as_wan_does(tmp_path):
    import diffusers
    import transformers

    model = random_model("umt5")
    model.save_pretrained(tmp_path / "text_encoder")
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    pipe = diffusers.WanPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, scheduler=None, transformer=None)
    theirs, _ = pipe.encode_prompt(TEXTS, do_classifier_free_guidance=False, max_sequence_length=48, device="cpu")
    ours = load_embedder(tmp_path, max_tokens=48).embed_many([clean(text) for text in TEXTS])
    assert [len(value) for value in ours][1:3] == [1, 48]
    for value, other in zip(ours, theirs.detach().numpy(), strict=True):
        np.testing.assert_allclose(value, other[: len(value)], atol=1e-5)
        assert not other[len(value) :].any()
