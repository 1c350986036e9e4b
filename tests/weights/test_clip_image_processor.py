import json

import pytest

from dit_video.core.errors import MissingError, UserError
from dit_video.models.features import ClipImageProcessor
from dit_video.weights import load_clip_image_processor, save_clip_image_processor

# Settings of openai/clip-vit-large-patch14 and Wan 2.1.
OLD = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224}
OLD |= {"feature_extractor_type": "CLIPFeatureExtractor"}
NEW = {"image_processor_type": "CLIPImageProcessor", "rescale_factor": 0.00392156862745098, "do_rescale": True}
NEW |= {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}, "do_convert_rgb": True}


def write(folder, values, name="preprocessor_config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize("values", [OLD, NEW], ids=["old", "new"])
def test_published_settings_are_the_defaults(tmp_path, values):
    write(tmp_path, values)
    assert load_clip_image_processor(tmp_path) == ClipImageProcessor()


def test_the_processor_is_found_beside_or_inside_other_parts(tmp_path):
    write(tmp_path / "image_processor", NEW | {"size": {"shortest_edge": 30}})
    write(tmp_path / "other", {"image_processor": NEW, "processor_class": "CLIPProcessor"}, "processor_config.json")
    (tmp_path / "image_encoder").mkdir()
    assert (
        load_clip_image_processor(tmp_path)
        == load_clip_image_processor(tmp_path / "image_encoder")
        == ClipImageProcessor(resize=30)
    )
    assert load_clip_image_processor(tmp_path / "other") == ClipImageProcessor()
    with pytest.raises(MissingError, match=r"has no preprocessor_config.json, nor has image_processor or feature"):
        load_clip_image_processor(tmp_path / "image_encoder" / "deeper")


@pytest.mark.parametrize(
    "images",
    [
        ClipImageProcessor(),
        ClipImageProcessor(resize=(30, 40), crop=None, mean=(0.5, 0.25, 0.1), std=(0.5, 0.5, 0.3)),
        ClipImageProcessor(resize=None, crop=(20, 30)),
    ],
)
def test_a_processor_comes_back_from_its_file(tmp_path, images):
    save_clip_image_processor(tmp_path / "new", images)
    assert load_clip_image_processor(tmp_path / "new") == images


def test_a_processor_may_leave_size_and_colours_as_they_are(tmp_path):
    write(tmp_path, NEW | {"do_normalize": False, "do_resize": False, "do_center_crop": False})
    result = load_clip_image_processor(tmp_path)
    assert result == ClipImageProcessor(resize=None, crop=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_processor_type": "SiglipImageProcessor"},
            r"SiglipImageProcessor\. Supported classes are CLIPImagePro",
        ),
        ({"image_processor_type": None}, r"class None\. Supported"),
        ({"resample": 2}, r"resample=2\. Only 3 \(bicubic\)"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
        ({"size": {"longest_edge": 30}}, r"size={'longest_edge': 30}\. Supported are height and width"),
        ({"size": {"shortest_edge": 30, "longest_edge": 50}}, "height and width and, for size, shortest_edge"),
        ({"crop_size": {"shortest_edge": 30}}, "crop_size"),
        ({"image_mean": [0.5]}, r"standard deviation \[0.5\]"),
        ({"image_std": [0.5, 0, 0.5]}, "use values above 0"),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, change, message):
    write(tmp_path, NEW | change)
    with pytest.raises(UserError, match=message) as caught:
        load_clip_image_processor(tmp_path)
    assert "\n" not in str(caught.value)
