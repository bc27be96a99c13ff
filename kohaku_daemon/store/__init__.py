"""What survives a restart: SQLite for what grows, TinyDB for what is small and readable."""
