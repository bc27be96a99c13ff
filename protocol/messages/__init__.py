"""Parameters and results of methods, one module a subject."""
