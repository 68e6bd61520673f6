"""Device code of the MX Linears, one file per kernel, behind `harness.mx.dispatch`. Imports nothing of the harness."""
