"""The callback in a LightningCLI configuration: each of its arguments can be given in YAML.

python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
"""

from digits import Digits, loaders
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI


class DigitsData(LightningDataModule):
    def train_dataloader(self):
        return loaders()[0]

    def val_dataloader(self):
        return loaders()[1]


if __name__ == "__main__":
    LightningCLI(Digits, DigitsData)
