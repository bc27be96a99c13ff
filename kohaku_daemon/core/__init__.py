"""Decisions. Events in, actions out.

No asyncio, no files, no clock, no randomness: time and secrets arrive as values.
"""
