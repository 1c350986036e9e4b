"""Small text encoders and a tokenizer of a few words, in the folders that `transformers` writes."""

import json
from pathlib import Path

from dit_video.models.encoders import T5Config
from dit_video.weights import save_text_encoder
from support.random_params import make_random_params

WORDS = ["a", "red", "green", "ball", "cube", "moves", "left", "right", "up", "down", "and", "the", "on", "table"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONFIG = T5Config(vocabulary=64, width=16, layers=2, heads=3, head_width=4, mlp_width=24, buckets=8, max_distance=12)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of whole words, and letters for others. Ids 0 to 2 are padding, end and unknown, as in T5."""
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS if len(word) > 1]
    pieces += [(letter, -8.0) for letter in LETTERS]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)


def write_encoder(folder: Path, config: T5Config = CONFIG, *, seed: int = 0) -> dict:
    """Write an encoder with random parameters, and return these."""
    params = make_random_params(config.make, seed)
    save_text_encoder(folder, config, params)
    return params


def change_json(path: Path, **values) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
