"""State, step, loop and what they need. Import the modules by name: the loop and its checkpoints load Orbax."""
