"""The studio's command, `python -m dit_video.web RUN_OR_FOLDER`; the studio itself is in `dit_video.apps`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("dit_video.apps", run_name="__main__")
