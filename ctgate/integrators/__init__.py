"""One step at a time, and the loops that take the steps."""
