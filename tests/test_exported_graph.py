"""Graphs that train on are pickled as they compute in eval mode."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from polyexport.capture import pickling


class Trained(nn.Module):
    """Every operator with an argument for training; some norms have no running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.lstm, self.gru = (kind(8, 8, 2, dropout=0.4, batch_first=True) for kind in (nn.LSTM, nn.GRU))
        self.norms = nn.Sequential(
            nn.BatchNorm1d(8),
            nn.InstanceNorm1d(8, track_running_stats=True),
            nn.InstanceNorm1d(8),
            nn.BatchNorm1d(8, track_running_stats=False),
        )
        self.dropouts = nn.Sequential(nn.Dropout(0.3), nn.Dropout1d(0.3), nn.AlphaDropout(0.3), nn.RReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        y = self.gru(self.lstm(y)[0])[0]
        return self.dropouts(self.norms(y.mT))  # type: ignore[no-any-return]


def test_each_operator_is_as_in_eval_mode(tmp_path: Path) -> None:
    module, x = Trained().train(), torch.randn(3, 5, 8)
    graph = torch.export.export(module, (x,)).module()
    graph(x)  # which changes running statistics
    module.load_state_dict(graph.state_dict())
    pickling.dump(graph, tmp_path / "graph")
    loaded = pickling.restore(tmp_path / "graph")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), module.eval()(x))
