"""The host's shell: turns connections into events for the core, and its actions into deeds."""
