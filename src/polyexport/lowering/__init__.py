"""Lowerings: an ONNX graph rebuilt from another framework's own operators.

`graph` walks the ONNX graph, `value` is what flows along its edges, `sizes` follows the contents of shapes; none of
them knows a framework. A folder per target framework holds its table of operators, one small function each.
"""
