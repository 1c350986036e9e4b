"""Tokenizers and text encoders."""

from dit_video.text.bytes import ByteEncoder, ByteEncoderConfig, ByteTokenizer
from dit_video.text.interface import Context, TextEncoder, TextEncoderConfig, Tokenizer

__all__ = [
    "ByteEncoder",
    "ByteEncoderConfig",
    "ByteTokenizer",
    "Context",
    "TextEncoder",
    "TextEncoderConfig",
    "Tokenizer",
]
