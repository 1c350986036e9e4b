"""The studio in a browser: sampling of a trained model, and a page that follows a training run."""
