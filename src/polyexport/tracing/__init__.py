"""Module to graph: what every tracer is shown."""
