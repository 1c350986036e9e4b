import subprocess
import sys
from pathlib import Path

import jax

from dit_video.platform.compilation_cache import enable_compilation_cache
from support.devices import PROGRAMS


def start(home: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAMS / "cached_compilation.py")],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "XDG_CACHE_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_second_start_finds_what_the_first_compiled(tmp_path):
    folder, hits = start(tmp_path)
    assert (folder, hits) == (str(tmp_path / "dit_video" / "programs"), "0")
    assert list(Path(folder).iterdir())
    assert int(start(tmp_path)[1]) >= 1


def test_a_compilation_cache_that_is_set_stays(tmp_path):
    assert enable_compilation_cache(tmp_path) == Path(jax.config.jax_compilation_cache_dir)
    assert not list(tmp_path.iterdir())
