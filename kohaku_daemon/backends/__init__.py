"""What a task runs in. ``base`` has the interface, ``registry`` the names."""
