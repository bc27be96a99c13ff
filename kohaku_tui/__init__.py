"""People's side of the cluster: the command line and what it shares with the screens. See README.md."""
