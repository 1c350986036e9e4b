"""Version of the package. A clone on `PYTHONPATH` has it, too, where nothing of the package is installed."""

__version__ = "0.1.0"
