"""Tokenizers and text encoders."""

from dit_video.models.encoders.byte_encoder import ByteEncoder, ByteEncoderConfig, ByteTokenizer
from dit_video.models.encoders.classes import ClassNamesConfig
from dit_video.models.encoders.embedder import Embedder
from dit_video.models.encoders.frozen import FrozenTextConfig
from dit_video.models.encoders.interface import (
    BatchTokenizer,
    CaptionTokens,
    Context,
    TextEncoder,
    TextEncoderConfig,
    Tokenizer,
)
from dit_video.models.encoders.t5 import T5Config
from dit_video.models.encoders.tokenizer import TOKENIZER_FILES, PretrainedTokenizer, clean, has_tokenizer
from dit_video.models.encoders.word_encoder import WordEncoder, WordEncoderConfig, WordTokenizer

TextConfig = ByteEncoderConfig | WordEncoderConfig | FrozenTextConfig | ClassNamesConfig
"""Configurations of the text encoders that a denoiser can be trained with."""
