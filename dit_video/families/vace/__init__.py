"""VACE: Wan's models with control."""
