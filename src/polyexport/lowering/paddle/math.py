"""Operators that work element by element."""
import paddle
from polyexport.lowering.paddle.target import OPS
OPS.elementwise("Relu")(lambda x: paddle.nn.functional.relu(x))
OPS.elementwise("Add",since=7)(lambda a,b: paddle.add(a,b))
