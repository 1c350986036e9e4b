"""Reading and writing of clips as video and image files (PyAV: no system ffmpeg)."""

from dit_video.video.clip import Clip
from dit_video.video.decode import Facts, average_rate, decode, probe
from dit_video.video.encode import Format, encode
from dit_video.video.reader import TOLERANCE

__all__ = ["TOLERANCE", "Clip", "Facts", "Format", "average_rate", "decode", "encode", "probe"]
