"""What coremltools lacks."""
