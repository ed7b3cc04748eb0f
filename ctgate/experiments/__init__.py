"""Experiments: each module computes one set of results; the command line calls them."""
