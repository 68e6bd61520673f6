"""Sub-commands that are no room's own: pages from records, exports."""
