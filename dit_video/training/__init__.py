"""Training state, step and loop. Import the modules by name: the loop and its checkpoints load Orbax."""
