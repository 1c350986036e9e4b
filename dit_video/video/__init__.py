"""Reading and writing of clips as video and image files (PyAV: no system ffmpeg)."""

from dit_video.video.clip import Clip, encode
from dit_video.video.comments import read_recipe
from dit_video.video.decode import VideoInfo, compute_average_fps, decode, probe
from dit_video.video.reader import TOLERANCE
