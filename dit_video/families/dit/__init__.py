"""DiT and SiT: class-conditional image transformers."""
