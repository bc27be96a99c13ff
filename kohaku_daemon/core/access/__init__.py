"""Who may do what: tokens as digests, and the rules of roles and owners."""
