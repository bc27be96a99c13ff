"""The runner's shell: link to the host, vault, backends, logs and readings around the core."""
