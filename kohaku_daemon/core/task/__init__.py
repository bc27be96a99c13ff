"""The life of tasks: the table of states, and what a submission must look like."""
