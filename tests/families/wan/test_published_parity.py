"""The names and shapes of the published folders of Wan are those of the classes of diffusers and transformers."""

import pytest

from support.wan_folders import FOLDERS

pytestmark = pytest.mark.parity


def list_shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_tensors_of_a_published_folder_are_those_of_diffusers(name):
    import diffusers
    import torch

    published = FOLDERS[name]
    for part in ("transformer", "vae"):
        config = published.documents[f"{part}/config.json"]
        # `from_config` drops what is no argument, such as `clip_output`.
        with torch.device("meta"):
            model = getattr(diffusers, config["_class_name"]).from_config(config)
        expected, shapes = list_shapes(model), published.weights[part].shapes
        unexpected = [tensor for tensor in shapes if tensor not in expected]
        assert {tensor: shapes[tensor] for tensor in shapes if tensor in expected} == expected
        # The class names what it ignores (`_keys_to_ignore_on_load_unexpected`).
        has_added_norms = part == "transformer" and "I2V-14B" in name and name.startswith("Wan2.1")
        assert len(unexpected) == (40 if has_added_norms else 0)
        assert all(tensor.endswith("attn2.norm_added_q.weight") for tensor in unexpected)
        if unexpected:
            assert type(model)._keys_to_ignore_on_load_unexpected == ["norm_added_q"]


def test_tensors_of_the_encoders_are_those_of_transformers():
    import torch
    import transformers

    published = FOLDERS["Wan2.1-I2V-14B-480P-Diffusers"]
    for part, kind in (("text_encoder", "UMT5"), ("image_encoder", "CLIPVision")):
        config = published.documents[f"{part}/config.json"]
        with torch.device("meta"):
            model = getattr(transformers, config["architectures"][0])(getattr(transformers, f"{kind}Config")(**config))
        expected = list_shapes(model)
        expected.pop("encoder.embed_tokens.weight", None)  # the embedding's other name, which is not saved
        assert published.weights[part].shapes == expected
