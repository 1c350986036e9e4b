"""Run a script as if optional packages were not installed; the arguments are its path and its own arguments."""

import runpy
import sys

for name in ("av", "grain", "tensorflow_datasets", "array_record", "tyro", "transformers", "orbax", "tqdm"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
