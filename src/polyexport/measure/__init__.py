"""Does an artifact agree with PyTorch, and how fast is it?"""
