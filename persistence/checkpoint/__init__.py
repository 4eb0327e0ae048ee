"""Checkpoints: restore points of one worker's whole state, in Redis or in a directory."""
