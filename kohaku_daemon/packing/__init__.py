"""Packed environments as files: how they are written, checked piece by piece, and unpacked.

Knows: names, pieces and their digests, compression. Does not know: Docker, who asks for what.
"""
