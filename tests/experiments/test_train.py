"""`experiments/train.py` with options that most runs do not use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = "tests/support/tiny.py"


def test_train_needs_held_out_clips_to_report_an_autoencoder(script, tiny_clips, tmp_path):
    arguments = ("--data", tiny_clips, "--workdir", tmp_path / "run", "--autoencoder-only", "--data.held-out")
    ended = script("experiments/train.py", ROOT / TINY, *arguments)
    assert ended.code == 2
    assert "no clips are held out to be reconstructed" in ended.err
    assert not (tmp_path / "run" / "autoencoder").exists()
