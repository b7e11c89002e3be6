"""Autotuning: timing of implementations, and the cache of the choices."""
