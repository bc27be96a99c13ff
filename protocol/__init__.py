"""The language that host, runner and people's side share. Imports neither of the other packages."""
