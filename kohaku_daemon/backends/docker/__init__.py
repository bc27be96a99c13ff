"""Tasks in containers of the machine's Docker engine.

``init`` is what a container starts with: a small program of ours that writes the task's output
straight into files and its wait status into another, with no daemon on the way.
"""
