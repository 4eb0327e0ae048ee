"""Conformance kits for session providers and shared tiers of your own: see ``docs/providers.md``.

Classes of tests to derive from. They need pytest and a plugin that runs coroutines
(pytest-asyncio, anyio); importing them needs neither.
"""
