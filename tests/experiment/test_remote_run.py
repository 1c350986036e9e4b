"""A run that is at an address alone: interrupted on one machine, continued on another, loaded on a third."""

import os

import pytest

import dit_video
from dit_video.core.errors import MissingError
from dit_video.experiment.launch import open_run
from dit_video.training.hooks.logging import read_metrics
from support.fake_gcs import serve
from support.interruptions import interrupt

pytest.importorskip("gcsfs")

pytestmark = pytest.mark.slow
ADDRESS = "gs://bucket/runs/tiny"


def train(experiment, clips, last: str | None = None) -> None:
    with open_run(ADDRESS, experiment) as run:
        assert run.folder.is_relative_to(os.environ["XDG_CACHE_HOME"])
        run.prepare(clips)
        run.run_stages(last)


def test_a_run_at_an_address_continues_on_another_machine(tiny, tiny_run, tiny_clips, tmp_path, monkeypatch):
    with serve() as gcs:
        with pytest.raises(MissingError, match=f"no such run: {ADDRESS}"):
            dit_video.load(ADDRESS)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
        train(tiny.EXPERIMENT, tiny_clips, "autoencoder")
        with monkeypatch.context() as patch:
            interrupt(patch, call=6, how="Ctrl-C")
            with pytest.raises(KeyboardInterrupt):
                train(tiny.EXPERIMENT, tiny_clips)
        names = gcs.list_names("runs/tiny/")
        assert any("checkpoints/denoiser/" in name for name in names)
        assert not any("pipeline/" in name for name in names)
        unfinished = dit_video.load(ADDRESS)
        assert unfinished.generate("a red circle", steps=1).frames.shape[0] == unfinished.config.size.t

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
        gcs.fail_at_random(0.02)  # both clients ask again
        train(tiny.EXPERIMENT, tiny_clips)
        gcs.fail = lambda *_: 0
        for name in ("autoencoder/weights.safetensors", "pipeline/denoiser.safetensors"):
            assert gcs.objects[f"runs/tiny/{name}"].content == (tiny_run / name).read_bytes()
        log = tmp_path / "metrics.jsonl"
        log.write_bytes(gcs.objects["runs/tiny/denoiser/metrics.jsonl"].content)
        losses, expected = (read_metrics(path) for path in (log, tiny_run / "denoiser" / "metrics.jsonl"))
        assert losses[-1]["step"] == expected[-1]["step"] == 10

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "three"))
        loaded = dit_video.load(ADDRESS)
        own = dit_video.load(tiny_run)
        prompt = {"size": (5, 16, 16), "seed": 3, "steps": 2}
        assert (loaded.generate("a red circle", **prompt).frames == own.generate("a red circle", **prompt).frames).all()
        # Nothing is in the bucket but the folder of the run: no temporary files, no locks that outlive it.
        assert not [name for name in gcs.list_names() if not name.startswith("runs/tiny/")]
