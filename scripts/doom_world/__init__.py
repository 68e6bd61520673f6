"""Training of the Doom demo model: data bank, autoencoder, world model."""
