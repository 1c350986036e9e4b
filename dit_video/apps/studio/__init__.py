"""Sampling in a browser: forms of the tasks, a fair queue, live previews and a gallery of each user."""
