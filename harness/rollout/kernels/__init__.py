"""Triton device code of the rollout; its host side is ``harness.rollout.fused``. Importing it needs Triton."""
