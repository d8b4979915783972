"""The engine: requests in, finished exports out."""
