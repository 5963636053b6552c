"""What the synchronizers are worth: variants of one model that differ in them alone."""
