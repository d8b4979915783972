"""Processes: where jobs run, what they may take, and the packages that they find."""
