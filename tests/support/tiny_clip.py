"""Small CLIPs and a tokenizer of letters and a few words, in the folders that `transformers` writes."""

import json
from pathlib import Path

from dit_video.models.features import ClipConfig, ClipTextConfig, ClipVisionConfig
from dit_video.weights import save_clip
from support.random_params import make_random_params

WORDS = ["red", "ball", "cube", "left"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = 2 * len(LETTERS), 2 * len(LETTERS) + 1
"""Ids after those of the letters within a word and of the letters at its end."""
TEXT = ClipTextConfig(
    width=16, layers=2, heads=2, mlp_width=24, projection=6, vocabulary=80, positions=12, end_token=END
)
VISION = ClipVisionConfig(width=12, layers=3, heads=3, mlp_width=20, projection=6, activation="gelu", size=12, patch=4)
CONFIG = ClipConfig(text=TEXT, vision=VISION)


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's `vocab.json` and `merges.txt`. A word of `WORDS` is one token; others are split into letters."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    merges = []
    for word in WORDS:
        left, *others = [*word[:-1], f"{word[-1]}</w>"]
        for letter in others:
            merges.append(f"{left} {letter}")
            left += letter
            tokens.append(left)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(dict.fromkeys(tokens))})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in dict.fromkeys(merges)))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **names}))


def write_clip(folder: Path, config: ClipConfig | ClipTextConfig | ClipVisionConfig = CONFIG, *, seed: int = 0) -> dict:
    """Write a model with random parameters, and return these."""
    params = make_random_params(config.make, seed)
    save_clip(folder, config, params)
    return params
