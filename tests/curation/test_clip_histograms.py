"""Histograms of the clips of a data set."""

from dit_video.curation.clip_histograms import make_clip_histograms
from dit_video.data.clips import KIND, ClipSource
from dit_video.data.ingest.rows import make_table
from dit_video.data.tables import write_manifest, write_part


def make_row(number, height, width, frames, fps, **fields):
    duration = round(frames / fps * 1e6) if frames > 1 else 0
    facts = {"height": height, "width": width, "frames": frames, "fps": fps, "duration_us": duration}
    return {"id": number, "name": str(number), "outcome": "kept", "codec": "h264", "transfer": "sdr", **facts, **fields}


def test_every_clip_is_counted(tmp_path):
    rows = [
        make_row(1, 480, 640, 30, 30.0, motion=1.0, audio_codec="aac"),
        make_row(2, 480, 640, 300, 30.0, transfer="pq", motion=20.0),
        make_row(3, 640, 480, 1, 1.0, codec="png"),
        make_row(4, 512, 512, 20_000, 25.0, codec="vp9", motion=20.5),
        make_row(5, 512, 512, 20_000, 25.0, motion=99.0) | {"outcome": "dropped"},
    ]
    write_part(tmp_path, "train-00000", make_table(rows))
    write_manifest(tmp_path, KIND, {}, ["train-00000"])
    histograms = make_clip_histograms(ClipSource(tmp_path))
    motion = histograms.pop("motion")
    assert histograms == {
        "sizes": {"480×640": 2, "512×512": 1, "640×480": 1},
        "shapes": {"upright": 1, "square": 1, "4:3 to 8:5": 2},
        "lengths": {
            **{"1–2 s": 1, "2–5 s": 0, "5–10 s": 0, "10–20 s": 1, "20–30 s": 0, "30–60 s": 0, "60–120 s": 0},
            **{"120–300 s": 0, "300–600 s": 0, "600–1800 s": 1},
        },
        "frames": {
            **{"1": 1, "2": 0, "3–4": 0, "5–8": 0, "9–16": 0, "17–32": 1, "33–64": 0, "65–128": 0, "129–256": 0},
            **{"257–512": 1, "513–1024": 0, "1025–2048": 0, "2049–4096": 0, "4097–8192": 0, "8193–16384": 0},
            "16385–32768": 1,
        },
        "rates": {"30 fps": 2, "25 fps": 1},
        "codecs": {"h264": 2, "png": 1, "vp9": 1},
        "transfers": {"sdr": 3, "pq": 1},
        "sound": {"none": 3, "aac": 1},
    }
    assert len(motion) == 12
    assert sum(motion.values()) == 3
