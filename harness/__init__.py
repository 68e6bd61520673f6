"""May a world model run in MX formats? Rolls it out in BF16 and in MX, and compares speed, memory and quality."""

from harness.threads import wait_passively

wait_passively()  # before anything here imports torch
