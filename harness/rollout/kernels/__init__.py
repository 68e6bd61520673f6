"""Triton device code of the rollout. Importing a module here needs Triton; its host side is ``harness.rollout.fused``."""
