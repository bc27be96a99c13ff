"""The daemons: one host that decides, many runners that execute. See README.md beside this file."""
