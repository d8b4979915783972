"""What is exported: a module, its checkpoint and its inputs, to a folder and back."""
