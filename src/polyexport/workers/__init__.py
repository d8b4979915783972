"""Worker processes: where jobs run, their resources, and their packages."""
