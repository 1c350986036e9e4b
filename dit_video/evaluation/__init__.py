"""What a model's output is worth: reconstruction, prompt following."""
