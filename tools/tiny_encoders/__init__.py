"""How the embedded encoders are made: their training pictures, the VAE, the CLIP, and what they must reach."""
