"""Tokenizers and text encoders."""

from dit_video.models.encoders.embedder import Embedder
from dit_video.models.encoders.interface import (
    BatchTokenizer,
    CaptionTokens,
    Context,
    FrozenTextConfig,
    Tokenizer,
)
from dit_video.models.encoders.t5 import T5Config
from dit_video.models.encoders.tokenizer import TOKENIZER_FILES, PretrainedTokenizer, clean, has_tokenizer
from dit_video.models.encoders.trained import (
    ByteEncoder,
    ByteEncoderConfig,
    ByteTokenizer,
    ClassNamesConfig,
    WordEncoder,
    WordEncoderConfig,
    WordTokenizer,
)

TextConfig = ByteEncoderConfig | WordEncoderConfig | FrozenTextConfig | ClassNamesConfig
"""Configurations of the text encoders that a denoiser can be trained with."""
