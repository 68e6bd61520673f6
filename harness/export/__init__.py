"""A checkpoint to take away: what a run judged, written as packed MX weights, and loaded without a BF16 copy."""
