"""The Doom demo: player, game and recording; data bank, autoencoder and world model."""
