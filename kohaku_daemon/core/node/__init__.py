"""What one runner decides."""
