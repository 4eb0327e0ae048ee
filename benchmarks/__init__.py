"""Benchmarks: named workloads, the engine beside its peers, in one run on one machine."""
