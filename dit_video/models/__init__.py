"""Models: autoencoders, backbones, encoders of text and images, and what they are conditioned on."""
