"""torch_geometric: a graph network whose batches differ in nodes, edges and graphs."""

from __future__ import annotations

import torch

from real.training import VERIFIED, Task, fit, main

REQUIREMENTS = ("torch-geometric",)
STATES = VERIFIED
DYNAMIC = {"x": {0: "nodes"}, "edge_index": {1: "edges"}}


def train(callback):
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GCNConv

    class Nodes(Task):
        def __init__(self):
            super().__init__(torch.nn.ModuleList([GCNConv(8, 16), GCNConv(16, 4)]))

        def forward(self, x, edge_index):
            first, second = self.network
            return second(first(x, edge_index).relu(), edge_index)

        def answer(self, batch):
            return self(batch.x, batch.edge_index)

    graphs = [Data(x=torch.randn(size, 8), edge_index=torch.randint(0, size, (2, 3 * size))) for size in range(4, 16)]
    fit(Nodes(), DataLoader(graphs, batch_size=4), callback)


if __name__ == "__main__":
    main(train, dynamic=DYNAMIC)
