"""The command of the studio: `python -m dit_video.web RUN_OR_FOLDER`."""
