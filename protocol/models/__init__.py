"""Values that both ends of the wire name."""
