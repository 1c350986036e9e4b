"""Tokenizers and text encoders."""

from dit_video.text.bytes import ByteEncoder, ByteEncoderConfig, ByteTokenizer
from dit_video.text.embedder import Embedder
from dit_video.text.interface import Context, TextEncoder, TextEncoderConfig, Tokenizer
from dit_video.text.t5 import T5Config, T5Encoder
from dit_video.text.tokenizer import PretrainedTokenizer, clean, holds_tokenizer

__all__ = [
    "ByteEncoder",
    "ByteEncoderConfig",
    "ByteTokenizer",
    "Context",
    "Embedder",
    "PretrainedTokenizer",
    "T5Config",
    "T5Encoder",
    "TextEncoder",
    "TextEncoderConfig",
    "Tokenizer",
    "clean",
    "holds_tokenizer",
]
