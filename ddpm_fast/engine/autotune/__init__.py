"""Timing of implementations, and the choices it kept on disk."""
