"""scvi-tools: a variational autoencoder over gene counts; its network is called by methods of its own, not forward."""

from __future__ import annotations

from real.training import VERIFIED, main, settings

REQUIREMENTS = ("scvi-tools",)
STATES = VERIFIED


def encoder(plan):
    """The part that serves: counts to the latent mean and variance."""
    return plan.module.z_encoder


def counts(batch):
    import torch

    return (torch.log1p(batch["X"]),)


def train(callback):
    import anndata
    import numpy
    import scvi

    cells = anndata.AnnData(numpy.random.default_rng(0).poisson(1.0, (64, 20)).astype("float32"))
    scvi.model.SCVI.setup_anndata(cells)
    given = settings(callback, monitor="elbo_validation")
    for theirs in ("logger", "limit_train_batches", "limit_val_batches", "accelerator", "devices", "max_epochs"):
        del given[theirs]
    model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4)
    model.train(1, accelerator="cpu", train_size=0.5, batch_size=16, check_val_every_n_epoch=1, logger=False, **given)


if __name__ == "__main__":
    main(train, module=encoder, inputs=counts)
