"""Encoded records: what a cache consists of (`parts`), how it lies on disk (`files`), and batches of it (`gather`)."""
