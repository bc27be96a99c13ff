"""The Docker engine of this machine: the only room that knows aiodocker.

Knows: how the engine is reached and asked, what its errors mean, images as streams of bytes.
Does not know: tasks and environments. Runner and host both build on it: the one runs containers,
the other makes environments.
"""
