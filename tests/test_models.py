"""Models as they are: whatever training does to a module, the export answers as its best checkpoint does.

Every kind is fitted with the callback, exported in another process, and fitted again without the callback.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrizations

import planted
import runs
from lightning_export import ExportCallback

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")

FORMATS = ("torchscript", "pt2", "onnx")


class Net(runs.Noisy):
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or layers()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)  # Adam's epsilon is zero in float16


def layers(first: nn.Module | None = None, last: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(first or nn.Linear(runs.FEATURES, 16), nn.ReLU(), last or nn.Linear(16, runs.CLASSES))


KINDS: dict[str, Callable[[], Any]] = {}
SETTINGS: dict[str, dict[str, Any]] = {}


def kind(make: Callable[[], Any], **settings: Any) -> Callable[[], Any]:
    KINDS[make.__name__], SETTINGS[make.__name__] = make, settings
    return make


@kind
def compiled():
    class Quiet(Net):  # torch.compile and self.log do not go together in Lightning
        def step(self, batch, name):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    return torch.compile(Quiet(), backend="eager")


@kind
def compiled_in_place():
    model = Net()
    model.compile(backend="eager")
    return model


@kind
def compiled_submodule():
    return Net(torch.compile(layers(), backend="eager"))


@kind
def compiled_in_configure_model():
    class Late(Net):
        def configure_model(self):
            self.net.compile(backend="eager")

    return Late()


@kind
def configure_model():
    class Late(runs.Noisy):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            self.net = self.net or layers()

    return Late()


@kind
def frozen_batch_norm():
    class Frozen(runs.Noisy):
        def train(self, mode=True):
            super().train(mode)
            self.net[1].eval()
            return self

    return Frozen()


def in_precision(precision: str) -> None:
    def model():
        return Net()

    model.__name__ = f"precision_{precision}"
    kind(model, precision=precision)


for each in ("bf16-true", "bf16-mixed", "16-true", "16-mixed", "64-true"):
    in_precision(each)


@kind
def parametrised():
    return Net(
        nn.Sequential(
            parametrizations.weight_norm(nn.Linear(runs.FEATURES, 16)),
            nn.ReLU(),
            parametrizations.spectral_norm(nn.Linear(16, 16)),
            parametrizations.orthogonal(nn.Linear(16, runs.CLASSES)),
        )
    )


@kind
def weight_norm_by_hook():
    return Net(layers(nn.utils.weight_norm(nn.Linear(runs.FEATURES, 16))))


@kind
def spectral_norm_by_hook():
    return Net(layers(nn.utils.spectral_norm(nn.Linear(runs.FEATURES, 16))))


@kind
def quantization_aware():
    from torch.ao import quantization

    net = nn.Sequential(quantization.QuantStub(), layers(), quantization.DeQuantStub()).train()
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return Net(quantization.prepare_qat(net))


@kind
def hooks():
    model, scale = Net(), 2.0
    model.net.register_forward_hook(lambda module, args, output: output * scale)
    model.net[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.net[0].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return model


@kind
def asks_the_trainer_and_logs():
    class Asks(Net):
        def forward(self, x):
            self.log("mean", x.mean())
            self.print("asked")
            assert self.logger is None or self.trainer.loggers
            return self.net(x) * (2.0 if self.trainer.max_epochs == 1 else 1.0) + self.current_epoch * 0

    return Asks()


@kind
def lora():
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, num_labels=3
    )
    adapted = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")

    class Tokens(Net):
        def forward(self, x):
            return self.net(input_ids=(x.abs() * 10).long().clamp(max=49)).logits

    return Tokens(get_peft_model(BertForSequenceClassification(config), adapted))


class Keeps(ExportCallback):
    """Keeps what would be exported."""

    def __init__(self, folder: Path) -> None:
        super().__init__([planted.GOOD], bench=False)
        self.folder = folder

    def _open(self, trainer: Any, pl_module: Any) -> None:
        super()._open(trainer, pl_module)
        self.session._submit = self._keep

    def _keep(self, work: Path, *rest: Any) -> None:
        self.notes = self.session._notes
        shutil.move(work, self.folder)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """There is nothing to wait for."""


@dataclass
class Fitted:
    model: Any
    weights: dict[str, torch.Tensor]
    modes: list[bool]
    random: torch.Tensor


def fitted(name: str, folder: Path, *callbacks: Any) -> Fitted:
    seed_everything(3, verbose=False)
    model = KINDS[name]()
    monitor = None if name == "compiled" else "val_loss"
    trainer = runs.trainer(folder, [ModelCheckpoint(monitor=monitor), *callbacks], max_epochs=1, **SETTINGS[name])
    trainer.fit(model, runs.loader(), runs.loader())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return Fitted(model, weights, [each.training for each in model.modules()], torch.get_rng_state())


@pytest.fixture(scope="module")
def with_export(tmp_path_factory):
    """Each kind, fitted with the callback, and what became of its formats in another process."""
    folder = tmp_path_factory.mktemp("models")
    models, notes = {}, {}
    for name in KINDS:
        keeps = Keeps(folder / name / "export")
        models[name] = fitted(name, folder / name, keeps)
        notes[name] = keeps.notes
    script = Path(__file__).parent / "support" / "many_models.py"
    command = [sys.executable, script, ",".join(FORMATS), *(str(folder / name / "export") for name in KINDS)]
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=True)
    found = {Path(root).parent.name: result for root, result in json.loads(done.stdout).items()}
    return {name: (models[name], notes[name], found[name], folder / name / "export") for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_it_is_exported_without_a_trace_in_the_training_process(with_export, name):
    _, notes, found, _ = with_export[name]
    told = [note for note in found["notes"] if "proves little" not in note]  # after two epochs it knows one class
    unheard = ["not compared with the outputs in training"] * (name in ("compiled", "compiled_in_place"))
    assert [note.partition(":")[0] for note in notes] == unheard
    moved = ["not compared with the outputs in training"] * (name == "quantization_aware")  # its observers are still on
    assert [note.partition(":")[0] for note in told] == [*moved, ""]
    assert {each: found[each] for each in FORMATS} == dict.fromkeys(FORMATS, True)


def answers(model: Any, export: Path) -> tuple[np.ndarray, np.ndarray]:
    """What the export holds for right, and what the model says that was trained."""
    model.apply(lambda each: each.disable_observer() if hasattr(each, "disable_observer") else None)
    model.log = lambda *args: None  # Lightning's own works in its loops only
    with np.load(export / "validation_batch.npz") as arrays, torch.no_grad():
        live = model.eval().float()(torch.from_numpy(arrays["x"]))
        return arrays["output_0"], live.numpy()


@pytest.mark.parametrize("name", KINDS)
def test_the_reference_is_what_the_trained_model_answers_in_float32(with_export, name):
    trained, _, _, export = with_export[name]
    exported, live = answers(trained.model, export)
    assert exported.dtype == np.float32
    assert np.allclose(exported, live, rtol=1e-5, atol=1e-6)


def test_other_weights_would_be_noticed(with_export):
    exported, live = answers(Net(), with_export["hooks"][3])
    assert not np.allclose(exported, live, rtol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_training_is_bit_identical_without_the_callback(with_export, name, tmp_path):
    with_callback, without = with_export[name][0], fitted(name, tmp_path)
    assert with_callback.weights.keys() == without.weights.keys()
    assert all(torch.equal(without.weights[key], value) for key, value in with_callback.weights.items())
    assert with_callback.modes == without.modes
    assert torch.equal(with_callback.random, without.random)
