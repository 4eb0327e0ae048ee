"""The workloads, one module per subject; each defines its own in one line, on top."""
