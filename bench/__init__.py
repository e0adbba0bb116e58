"""Benchmarks: latency, memory and quality of edits, and the checkpoints they run on."""
