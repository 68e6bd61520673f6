"""The modules that take the place of an ``nn.Linear``, one file per kernel."""
