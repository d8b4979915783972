"""Programs have no operators in place where something else sees what they write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polyexport.tracing.dropouts import remove_dropouts
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
        y[:, :, -9:2] -= 1
        return y.slice_scatter(torch.ones(2, 1, 4, 4, dtype=torch.int32), 1, 1, 2)


class ReadBefore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        part, other = y.chunk(2)
        y.mul_(2)
        return part + other


class Undeclared(nn.Module):
    """Writes to tensors that share memory, of which the schemas of PyTorch's operators say nothing."""

    def forward(self, x: Tensor) -> Tensor:
        (y,) = torch.meshgrid(row := x[0, 0, 0].exp(), indexing="ij")
        y[1:] += 1
        torch.broadcast_tensors(z := x[1, 1, 1].exp(), row)[0].mul_(2)
        return row + z


def program_of(module: nn.Module) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module.eval(), (torch.rand(2, 3, 4, 4),))


def writers(program: torch.export.ExportedProgram) -> list[str]:
    nodes = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return [str(node.target) for node in nodes if node.target._schema.is_mutable]


@pytest.mark.parametrize(
    "module", [Written(), Assigned(), ReadBefore(), Undeclared()], ids=lambda each: type(each).__name__
)
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


def test_what_is_written_to_the_result_of_an_idle_dropout_is_in_its_argument() -> None:
    class Dropped(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.exp()
            nn.functional.dropout(y, training=self.training)[:, 1:].zero_()
            return y + x, nn.functional.dropout(x, training=self.training)

    program = program_of(Dropped())
    remove_dropouts(program)
    x = torch.rand(2, 3, 4, 4)
    for made in (program, functional(program)):
        torch.testing.assert_close(made.module()(x), Dropped().eval()(x))
