"""Watching: tells who wants to know which sessions change; see ``docs/watching.md``."""
