"""Formats for the web: Node, which runs their artifacts here, and the page that runs them in a browser."""
