"""What an arm held, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Memory:
    """Bytes of weights and KV window, and the allocator's figures; ``None`` where a device keeps no such account.

    ``peaks``: of each batch, ``peak_allocated``, ``peak_reserved`` and ``transient``.
    """

    weight_bytes: int
    kv_window_bytes: int
    kv_window_bytes_computed: int | None = None
    kv_window_bytes_unquantised: int | None = None
    kv_bytes_by_format: dict[str, int] = field(default_factory=dict)
    kv_scratch_bytes: int = 0
    kv_peak_bytes: int | None = None
    kv_dequantised_bytes_per_step: int | None = None
    cache_and_graph_allocated: int | None = None
    peak_allocated: int | None = None
    peak_reserved: int | None = None
    transient: int | None = None
    process_peak_rss: int | None = None
    peaks: list[dict[str, int]] = field(default_factory=list)
