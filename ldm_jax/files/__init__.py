"""Files: atomic writes, locks, JSON lines, ledgers, buckets."""
