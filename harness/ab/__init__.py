"""The A/B run: both arms over the same clips, what watches them, and what becomes of their results."""
