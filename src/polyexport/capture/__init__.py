"""Saving what is exported (a module, its checkpoint and its inputs) to a folder, and loading it again."""
