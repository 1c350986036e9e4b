"""Tokenizers and text encoders."""

from dit_video.text.byte_encoder import ByteEncoder, ByteEncoderConfig, ByteTokenizer
from dit_video.text.classes import ClassNames, ClassNamesConfig, ClassTokenizer
from dit_video.text.embedder import Embedder, FrozenEncoderConfig
from dit_video.text.frozen import FrozenText, FrozenTextConfig
from dit_video.text.interface import CaptionTokens, Context, TextEncoder, TextEncoderConfig, Tokenizer
from dit_video.text.t5 import T5Config, T5Encoder
from dit_video.text.tokenizer import TOKENIZER_FILES, PretrainedTokenizer, clean, has_tokenizer

TextConfig = ByteEncoderConfig | FrozenTextConfig | ClassNamesConfig
"""Configurations of the text encoders that a denoiser can be trained with."""

__all__ = [
    "TOKENIZER_FILES",
    "ByteEncoder",
    "ByteEncoderConfig",
    "ByteTokenizer",
    "CaptionTokens",
    "ClassNames",
    "ClassNamesConfig",
    "ClassTokenizer",
    "Context",
    "Embedder",
    "FrozenEncoderConfig",
    "FrozenText",
    "FrozenTextConfig",
    "PretrainedTokenizer",
    "T5Config",
    "T5Encoder",
    "TextConfig",
    "TextEncoder",
    "TextEncoderConfig",
    "Tokenizer",
    "clean",
    "has_tokenizer",
]
