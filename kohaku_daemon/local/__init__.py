"""The cluster of one machine: its daemons as processes, from ``kohakud up`` to ``kohakud down``."""
