"""What the processes of `forked` have imported when they begin, and the servers that they share.

Imported only by the process that they are forked from.
"""

import contextlib
import os

import lightning.pytorch  # noqa: F401  # for the processes that are forked
import networkx  # noqa: F401
import onnxscript.function_libs.torch_lib.ops
import onnxscript.rewriter  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch

import lightning_export  # noqa: F401
import planted  # noqa: F401
import runs  # noqa: F401
from polyexport.workers import toolchain
from polyexport.workers.process import Workers, environment, shared_servers

os.environ.pop("PYTHONPATH", None)  # it was this process's alone
torch.set_num_threads(1)  # a thread of this process would be missing in those that are forked

shared = contextlib.ExitStack()  # ended with this process
shared.enter_context(shared_servers())
workers, around = Workers(), environment(threads=1, gpu=False, host=True)
for chain in map(toolchain.find, ("host", "torch", "onnx", "openvino")):
    for converts in (True, False):
        workers.warm(chain.command(workers), chain.imports(converts=converts), around)
