"""Preparing a module for tracers, and reading traced programs."""
