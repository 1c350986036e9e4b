"""The page that follows a training run."""

from dit_video.web.run_page.routes import make_run_routes
