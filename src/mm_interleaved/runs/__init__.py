"""Documents in, a finished run folder out."""
