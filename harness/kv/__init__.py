"""Ring buffers of K and V, and the formats they are stored in."""

from typing import TYPE_CHECKING

from harness.lazily import attributes

if TYPE_CHECKING:
    from harness.kv.cache import KVBytes, KVCache
    from harness.kv.conf import EMAConf, KVConf, KVFormat, KVScales, KVStorage, describe, validate
    from harness.kv.stats import KVStats
else:
    __getattr__ = attributes(
        __name__,
        {
            "cache": "KVBytes KVCache",
            "conf": "EMAConf KVConf KVFormat KVScales KVStorage describe validate",
            "stats": "KVStats",
        },
    )

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
