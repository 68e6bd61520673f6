"""MX numbers: element formats, scales, blocks, and exact encoding and decoding. Imports torch alone."""
