"""Train scikit-learn's digits with fake quantization, and compare with quantization after training, in four runtimes.

python examples/qat.py

`torch.ao` rounds weights and activations during training, so that the model learns to work with eight bits. ONNX,
OpenVINO, ExecuTorch and TensorFlow Lite in int8 then use the trained scales. On images as small as these, eight bits
cost next to no accuracy either way; the example shows that the trained scales are used.
Formats given as arguments replace those four.
"""

import copy
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.ao import quantization
from torch.nn import functional

import polyexport

FORMATS = ["onnx-int8", "openvino-int8", "executorch-int8", "tflite-int8"]


class Net(nn.Module):
    """A narrow classifier of 8x8 gray images."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = quantization.QuantStub()  # where fake quantization begins; does nothing without it
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.relu1, self.relu2, self.head = nn.ReLU(), nn.ReLU(), nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.relu1(self.conv1(self.quant(image)))
        return {"logits": self.head(self.relu2(self.conv2(x)).flatten(1))}


def fit(net: nn.Module, image: torch.Tensor, digit: torch.Tensor, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(image)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(image[rows])["logits"], digit[rows]).backward()
            optimizer.step()


def main() -> None:
    torch.manual_seed(1)
    digits = load_digits()
    image, digit = torch.tensor(digits.images[:, None], dtype=torch.float32) / 16, torch.tensor(digits.target)
    formats = sys.argv[1:] or FORMATS
    train, test = slice(0, 1400), slice(1400, None)
    net = Net()
    fit(net, image[train], digit[train], epochs=15, rate=3e-3)
    aware = quantization.fuse_modules_qat(copy.deepcopy(net), [["conv1", "relu1"], ["conv2", "relu2"]])
    aware.qconfig = quantization.get_default_qat_qconfig("qnnpack")
    quantization.prepare_qat(aware, inplace=True)
    fit(aware, image[train], digit[train], epochs=5, rate=5e-4)
    aware.apply(quantization.disable_observer)  # else each call would move the scales

    def accuracy(run: polyexport.Runner) -> dict[str, float]:
        logits = run({"image": image[test].numpy()})["logits"]
        return {"accuracy": float((logits.argmax(1) == digit[test].numpy()).mean())}

    for title, model in (("quantized after training", net), ("trained with fake quantization", aware)):
        into = f"runs/qat/{title.split()[0]}"
        budget = {"accuracy": polyexport.Budget(0.01, mode="max")}
        report = polyexport.export(
            model, image[test], formats, into, dynamic=False, metric=accuracy, budget=budget, bench=False
        )
        print(f"{title}: PyTorch {report.metrics['accuracy']:.4f}")
        for outcome in report.outcomes:
            print(f"  {outcome.format} ({outcome.route}): {outcome.metrics['accuracy']:.4f}, {outcome.state}")


if __name__ == "__main__":
    main()
