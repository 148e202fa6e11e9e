"""Benchmarks of text encoders against rivals: what `gristmill bench` runs, and what `benchmarks/` shares with it."""
