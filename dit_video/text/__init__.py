"""Tokenizers and text encoders."""

from dit_video.text.byte_encoder import ByteEncoder, ByteEncoderConfig, ByteTokenizer
from dit_video.text.classes import ClassNamesConfig
from dit_video.text.embedder import Embedder
from dit_video.text.frozen import FrozenTextConfig
from dit_video.text.interface import BatchTokenizer, CaptionTokens, Context, TextEncoder, TextEncoderConfig, Tokenizer
from dit_video.text.t5 import T5Config
from dit_video.text.tokenizer import TOKENIZER_FILES, PretrainedTokenizer, clean, has_tokenizer
from dit_video.text.word_encoder import WordEncoder, WordEncoderConfig, WordTokenizer

TextConfig = ByteEncoderConfig | WordEncoderConfig | FrozenTextConfig | ClassNamesConfig
"""Configurations of the text encoders that a denoiser can be trained with."""
