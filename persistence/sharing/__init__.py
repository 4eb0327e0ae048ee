"""Keeps this worker's sessions in step with the shared tier."""
