"""Calls in, events or answers out. No decisions: those are the engine's.

``calls.CALLS`` has the handler of every method that clients may call.
"""
