"""Which node, which cores, which GPUs: books of what is held, filter, rank, claim, explain."""
