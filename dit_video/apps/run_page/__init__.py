"""The page that follows a training run."""

from dit_video.apps.run_page.routes import make_run_routes
