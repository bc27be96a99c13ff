"""What the host decides."""
