"""Programs have no operators in place where something else sees what they write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polyexport.tracing.in_place import functional


class Block(nn.Module):
    """A residual block as torchvision has it: what is written in place is read through the result only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return self.relu(y).flatten(1)  # type: ignore[no-any-return]


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        y.view(-1)[:3].zero_()
        return y


class Assigned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        y[:, 0] = y[:, 1]
        y[..., -1] += 1
        y[:, :, 1:3].sigmoid_()
        y[:, 1:, -3:] *= 2
        y[..., ::2] *= 3
        y[..., 1::2] = 0
        y[:, :, 1::5] *= 4
        y[:, 3:] = 5
        return y


class ReadBefore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        part, other = y.chunk(2)
        y.mul_(2)
        return part + other


def program_of(module: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), (torch.rand(2, 3, 4, 4),))


def writers(program: torch.export.ExportedProgram) -> list[str]:
    nodes = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [str(node.target) for node in nodes if node.target._schema.is_mutable]


@pytest.mark.parametrize("module", [Written(), Assigned(), ReadBefore()], ids=lambda each: type(each).__name__)
def test_what_another_operator_sees_is_written_no_more(module: nn.Module) -> None:
    program = program_of(module)
    made = functional(program)
    assert writers(program)
    assert not writers(made)
    assert not [node for node in made.graph.nodes if "scatter" in str(node.target)]
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(made.module()(x), module(x))


def test_what_only_results_are_read_of_stays() -> None:
    program = program_of(Block())
    assert functional(program) is program
    assert {"aten.add_.Tensor", "aten.relu_.default"} <= {*writers(program)}
