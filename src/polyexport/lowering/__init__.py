"""Lowerings: an ONNX graph rebuilt from another framework's own operators.

`graph` walks the ONNX graph, `value` is what its edges carry, `sizes` tracks the contents of shapes, and `opsets`
converts older forms of operators to the newest; none of them knows a framework. `backend` lists the primitives that a
framework provides, and `operators` has the operators that are composed of them. Each framework's folder has its
primitives, and the operators that it implements in its own way.
"""
