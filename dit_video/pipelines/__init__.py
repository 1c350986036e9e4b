"""A trained model with all that sampling needs."""
