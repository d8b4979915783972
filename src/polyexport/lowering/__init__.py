"""Lowerings: an ONNX graph rebuilt from another framework's own operators.

`graph` walks the ONNX graph, `value` is what its edges carry, `sizes` tracks the contents of shapes, `opsets` converts
older forms of operators to the newest, and `definitions` has those that the standard defines by others; none of them
knows a framework. `backend` lists the primitives that a framework provides, and `operators` has the operators that are
composed of them. Each framework's folder has its primitives, and the operators that it implements in its own way.

To add an operator: a function in the file of `operators` that has its like, declared as `table` says. Only if the
frameworks need different code, write it in `tensorflow` and in `paddle`.
"""
