"""Gated recurrent networks as continuous-time systems whose gates are inverse time constants."""

__version__ = "0.1.0"
