"""Translations and passes that coremltools lacks or gets wrong."""
