"""Detection: a detector's postprocessing in plain PyTorch becomes part of each artifact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import polyexport

BOXES, CLASSES, KEPT = 12, 3, 3


class Detector(nn.Module):
    """Raw boxes and logits of `BOXES` boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * 4 * 4, BOXES * (4 + CLASSES))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.head(self.conv(image).relu().flatten(1)).view(-1, BOXES, 4 + CLASSES)
        return found[..., :4], found[..., 4:]


def decoded(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Corners, best score and its class."""
    raw, logits = found
    center, half = (3 * raw[..., :2]).sigmoid(), raw[..., 2:].sigmoid() / 4 + 0.02
    scores, labels = (3 * logits).softmax(-1).max(-1)
    return torch.cat([center - half, center + half], -1), scores, labels


def overlap(box: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Intersection over union of one box (N, 1, 4) with others (N, B, 4)."""
    first, last = torch.maximum(box[..., :2], boxes[..., :2]), torch.minimum(box[..., 2:], boxes[..., 2:])
    common = (last - first).clamp(min=0).prod(-1)
    one, others = ((each[..., 2:] - each[..., :2]).prod(-1) for each in (box, boxes))
    return common / (one + others - common)


def suppressed(found: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The best box, `KEPT` times, each time without those that overlap it; what is empty is zero, of class -1."""
    boxes, scores, labels = decoded(found)
    left, kept = scores, []
    for _ in range(KEPT):
        score, at = left.max(1, keepdim=True)
        box = boxes.gather(1, at[..., None].expand(-1, -1, 4))
        some = score > 0
        kept.append((box * some[..., None], score * some, torch.where(some, labels.gather(1, at), -1)))
        left = torch.where(overlap(box, boxes) > 0.3, -1.0, left)
    columns = (torch.cat(parts, 1) for parts in zip(*kept, strict=True))
    return dict(zip(("boxes", "scores", "labels"), columns, strict=True))


def above_a_threshold(found: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As many boxes as are sure enough, of all images together."""
    boxes, scores, labels = decoded(found)
    sure = scores > 0.5
    return {"boxes": boxes[sure], "scores": scores[sure], "labels": labels[sure]}


def images() -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector()


def test_boxes_are_suppressed_and_some_are_left():
    found = suppressed(detector()(images()))
    greatest = decoded(detector()(images()))[1].topk(KEPT).values
    assert not torch.equal(found["scores"], greatest), "the data has boxes that overlap"
    assert (found["scores"][:, 0] == greatest[:, 0]).all()


NMS = ("torchscript", "onnx", "openvino", "saved_model", "tflite", "coreml", "paddle", "mnn")


@pytest.mark.slow  # the others are made from these; docs/processing.md has all
def test_non_maximum_suppression_is_part_of_each_artifact(tmp_path: Path):
    report = polyexport.export(detector(), images(), NMS, tmp_path / "out", bench=False, postprocess=suppressed)
    assert {each.format: (each.state, each.reason) for each in report.outcomes} == dict.fromkeys(NMS, ("verified", ""))


def test_no_box_at_all_is_an_answer_of_tensorflow_js(tmp_path: Path):
    report = polyexport.export(
        detector(), images(), ["tfjs"], tmp_path / "out", bench=False, dynamic=False, postprocess=above_a_threshold
    )
    assert (report["tfjs"].state, report["tfjs"].reason) == ("verified", "")
    with polyexport.Engine() as engine, engine.runner(report, "tfjs") as run:
        sizes = {len(run({"image": scale * images().numpy()})["scores"]) for scale in (0, 1, 9)}
    assert 0 in sizes
