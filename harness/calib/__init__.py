"""Calibration: weights in MX chosen for the inputs they will meet, rather than rounded to nearest."""
