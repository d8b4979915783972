"""Changes of an ONNX graph that stays one: for runtimes and generators that read ONNX, but not all of it."""
