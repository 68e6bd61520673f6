"""Ring buffers of K and V, and the formats they are stored in."""

from harness.kv.cache import KVBytes, KVCache
from harness.kv.conf import KVConf, KVFormat, KVStorage, validate

__all__ = ["KVBytes", "KVCache", "KVConf", "KVFormat", "KVStorage", "validate"]
