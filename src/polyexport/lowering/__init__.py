"""Lowerings: an ONNX graph rebuilt from another framework's own operators.

`graph` walks the ONNX graph, `value` is what flows along its edges, `sizes` follows the contents of shapes, `opsets`
brings older forms of operators to today's; none of them knows a framework. `backend` lists the primitives that a
framework is asked for, and `operators` holds what is composed of them. A folder per framework has its primitives, and
the operators that it does in a way of its own.
"""
