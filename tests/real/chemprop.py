"""chemprop: message passing over molecules; forward takes an object, which a wrapper builds from tensors."""

from __future__ import annotations

import torch

from real.training import VERIFIED, main, settings

REQUIREMENTS = ("chemprop",)
STATES = VERIFIED
MOLECULES = ("CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCC", "CNC", "C1CCCCC1", "CO", "CCOC", "CCC", "CC=O", "OCCO")
AXES = {"V": "atoms", "batch": "atoms", "E": "bonds", "rev_edge_index": "bonds"}
DYNAMIC = {name: {0: axis} for name, axis in AXES.items()} | {"edge_index": {1: "bonds"}}


class OfTensors(torch.nn.Module):
    """The model over the five tensors of its graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, V, E, edge_index, rev_edge_index, batch):
        from chemprop.data import BatchMolGraph

        graph = object.__new__(BatchMolGraph)
        graph.V, graph.E, graph.edge_index, graph.rev_edge_index, graph.batch = V, E, edge_index, rev_edge_index, batch
        return self.model(graph)


def tensors(batch):
    return {name: getattr(batch.bmg, name) for name in ("V", "E", "edge_index", "rev_edge_index", "batch")}


def train(callback):
    from chemprop import data, models, nn
    from lightning.pytorch import Trainer

    molecules = [data.MoleculeDatapoint.from_smi(smiles, [float(len(smiles))]) for smiles in MOLECULES]
    loading = data.build_dataloader(data.MoleculeDataset(molecules), batch_size=4, shuffle=False)
    model = models.MPNN(nn.BondMessagePassing(d_h=16, depth=2), nn.MeanAggregation(), nn.RegressionFFN(input_dim=16))
    Trainer(**settings(callback)).fit(model, loading, loading)


if __name__ == "__main__":
    main(train, module=OfTensors, inputs=tensors, dynamic=DYNAMIC)
