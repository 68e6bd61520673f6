"""Ring buffers of K and V, and the formats they are stored in."""

from harness.kv.cache import KVBytes, KVCache
from harness.kv.conf import EMAConf, KVConf, KVFormat, KVScales, KVStorage, describe, validate
from harness.kv.stats import KVStats

__all__ = [
    "EMAConf",
    "KVBytes",
    "KVCache",
    "KVConf",
    "KVFormat",
    "KVScales",
    "KVStats",
    "KVStorage",
    "describe",
    "validate",
]
