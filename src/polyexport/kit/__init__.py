"""Verification on another machine, which has the artifact's runtime: a kit to copy there, and the proof it returns."""
