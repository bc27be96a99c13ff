"""Images on this node: brought to its engine once, told apart, and let go of."""
