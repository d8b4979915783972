"""scvi-tools: a variational autoencoder over gene counts; its network is called by methods of its own, not forward."""

from __future__ import annotations

import torch

from real.training import VERIFIED, main, settings

REQUIREMENTS = ("scvi-tools",)
STATES = VERIFIED


class Latent(torch.nn.Module):
    """The part that serves: counts to the latent mean; the sample beside it is another at each call."""

    def __init__(self, plan):
        super().__init__()
        self.encoder = plan.module.z_encoder

    def forward(self, counts):
        return self.encoder(torch.log1p(counts))[0].loc


def counts(batch):
    return batch["X"]


def train(callback):
    import anndata
    import numpy
    import scvi

    cells = anndata.AnnData(numpy.random.default_rng(0).poisson(1.0, (64, 20)).astype("float32"))
    scvi.model.SCVI.setup_anndata(cells)
    given = settings(callback, monitor="elbo_validation")
    scvi.settings.logging_dir = given["default_root_dir"]
    for named in ("logger", "accelerator", "devices", "max_epochs"):  # its own parameters
        del given[named]
    model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4)
    model.train(
        1,
        accelerator="cpu",
        train_size=0.5,
        batch_size=16,
        check_val_every_n_epoch=1,
        logger=False,
        enable_checkpointing=True,
        **given,
    )


if __name__ == "__main__":
    main(train, module=Latent, monitor="elbo_validation", inputs=counts)
