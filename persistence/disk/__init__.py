"""The disk tier: an append-only log of segments, journal and spill store in one."""
