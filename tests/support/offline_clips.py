"""Random clips in memory and the config of an autoencoder, for offline encoding."""

import hashlib

import numpy as np

from dit_video.core.errors import MissingError
from dit_video.data.clips import ClipInfo, ClipSource
from dit_video.data.latents.plan import Encoding
from dit_video.data.sizes import SizeLimits
from dit_video.models.autoencoders import PatchVaeConfig
from dit_video.tokens import Grid
from dit_video.video.background import BLACK
from dit_video.video.encode import encode_frames
from support.random_params import make_random_params

MODEL = PatchVaeConfig(stride=Grid(2, 2, 2), channels=3, width=4, blocks=1)
PARAMS = make_random_params(MODEL.make)
LIMITS = SizeLimits(max_pixels=48 * 48, max_frames=5, multiple=Grid(2, 2, 2))
MIXED_SIZES = [Grid(t, h, w) for t in (1, 4, 9) for h, w in ((16, 22), (10, 30), (34, 18), (26, 26))]


class MemorySource(ClipSource):
    """Clips in memory, with the interface of an ingested data set; `read` lists the clips that were read."""

    infos = None

    def __init__(self, infos, contents):
        self.infos, self.contents, self.read = tuple(infos), contents, []
        self._background = BLACK

    def __len__(self):
        return len(self.infos)

    def column(self, name):
        values = [getattr(info, name) for info in self.infos]
        return np.asarray(values) if isinstance(values[0] if values else "", int | float) else values

    def read_columns(self, index, names):
        return {name: getattr(self.infos[index], name) for name in names}

    def __getitem__(self, index):
        if self.contents is None:
            raise MissingError("no such data set")
        self.read.append(index)
        return self.contents[index]


def make_source(sizes, *, captions=("one", "two, from the left")) -> MemorySource:
    """Make clips of random pixels."""
    draw = np.random.default_rng(0)
    contents, infos = [], []
    for number, (t, h, w) in enumerate(sizes):
        suffix = "png" if t == 1 else "apng"
        contents.append(encode_frames(draw.integers(0, 256, (t, h, w, 3), np.uint8), 8.0, suffix))
        payload = hashlib.sha256(contents[-1]).hexdigest()
        infos.append(ClipInfo(f"{number}.{suffix}", captions, h, w, t, 8.0, (t - 1) / 8, payload=payload))
    return MemorySource(infos, contents)


def make_encoding(**changes) -> Encoding:
    """Return the options of offline encoding, some of them changed."""
    defaults = {"autoencoder": MODEL, "params": PARAMS, "limits": LIMITS, "storage": "float32"}
    return Encoding(**defaults | changes)
