"""The studio's command, `python -m dit_video.web RUN_OR_FOLDER`; the studio itself is in `dit_video.apps`."""

from dit_video.apps.__main__ import main

if __name__ == "__main__":
    main()
