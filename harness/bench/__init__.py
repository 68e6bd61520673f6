"""Benchmarks, tuners and checks: what measures the product, beside what the product does."""
