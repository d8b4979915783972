"""Signatures of exports, which show that one is complete and who made it: OpenSSF Model Signing.

https://github.com/sigstore/model-transparency, whose `model_signing verify key` checks it too

Requirements:
* The signature covers the artifacts that agree with PyTorch, and `bom.json`, which has the hashes of the batches that
  they were verified with. It does not cover the report, since a new timing changes that. A proof from another machine
  changes the `polyexport.json` of an artifact: sign again then.
* A file that was added to an artifact's folder, changed or removed is found, and so is an artifact that was not signed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from polyexport.errors import BadRequest, NotSigned, line
from polyexport.measure.verification import sha256
from polyexport.publish.bom import BOM, BillOfMaterials
from polyexport.report.report import Report
from polyexport.serialization import read_json

SIGNATURE = "model.sig"


class Signed:
    """A sink that writes `bom.json`, and `model.sig` over the artifacts and that, into the export's folder.

    Not a dataclass, since Hydra takes those for a part of the configuration.

    Args:
        key: File with a private key on an elliptic curve, in PEM: `openssl ecparam -name prime256v1 -genkey -noout -out
            key.pem`.
        password: The key's password, if it is encrypted.

    Raises:
        BadRequest: there is no such file, or `model-signing` is not installed.
    """

    def __init__(self, key: str | Path, *, password: str | None = None) -> None:
        _check_installed()
        self.key = _file(key, "key")
        self.password = password

    def __call__(self, report: Report) -> None:
        """Sign the artifacts of a report.

        Raises:
            BadRequest: none of them agrees with PyTorch, or the file is not a private key that can sign.
        """
        from model_signing import signing

        names = [outcome.format for outcome in report.publishable]
        if not names:
            raise BadRequest("no artifact agrees with PyTorch")
        BillOfMaterials()(report)
        config = signing.Config().set_hashing_config(_hashing(report.folder, names))
        try:
            config.use_elliptic_key_signer(private_key=self.key, password=self.password)
        except Exception as error:  # cryptography raises many types for a file that is not a key
            raise BadRequest(f"{self.key} is not a private key that can sign: {line(error, 200)}") from None
        config.sign(report.folder, report.folder / SIGNATURE)


def check(report: Report, key: Path) -> tuple[str, ...]:
    """Check the signature of an export, and that its artifacts are those that were signed.

    Args:
        report: The export's.
        key: File with the public key.

    Returns:
        The formats that are signed.

    Raises:
        BadRequest: there is no signature, or no such key file.
        NotSigned: it is by another key, or a file was changed, added or removed.
    """
    _check_installed()
    from model_signing import verifying

    signature = report.folder / SIGNATURE
    if not signature.is_file():
        raise BadRequest(f"{report.folder} has no signature: {SIGNATURE}, which Signed(key) writes")
    names = [outcome.format for outcome in report.outcomes if outcome.artifact]
    try:
        listed = {each["bom-ref"]: each for each in read_json(report.folder / BOM)["components"]}
        signed = [name for name in names if name in listed]
        config = verifying.Config().use_elliptic_key_verifier(public_key=_file(key, "key"))
        config.set_hashing_config(_hashing(report.folder, signed)).verify(report.folder, signature)
    except BadRequest:
        raise
    except Exception as error:  # the library raises many types for what does not fit
        raise NotSigned(f"{report.folder} is not what was signed by {key}: {line(error, 300)}") from None
    for each in listed.values():
        if each["type"] == "file" and sha256(report.folder / each["name"]) != each["hashes"][0]["content"]:
            raise NotSigned(f"{report.folder / each['name']} was changed after it was signed: its SHA-256 differs")
    if unsigned := [outcome.format for outcome in report.publishable if outcome.format not in signed]:
        raise NotSigned(f"{report.folder} has artifacts that are not signed: {', '.join(unsigned)}")
    return tuple(signed)


def _hashing(folder: Path, names: list[str]) -> Any:
    """How the folder is hashed: artifacts and `bom.json`, without everything else in it."""
    from model_signing import hashing

    others = [path for path in folder.iterdir() if path.name not in (*names, BOM)]
    return hashing.Config().set_ignored_paths(paths=others, ignore_git_paths=False)


def _file(path: str | Path, what: str) -> Path:
    if not Path(path).is_file():
        raise BadRequest(f"{what}={str(path)!r}: there is no such file")
    return Path(path)


def _check_installed() -> None:
    if find_spec("model_signing") is None:
        raise BadRequest(
            "signatures require model-signing; install with `pip install lightning-export[signing]` or "
            "`pip install model-signing`"
        )
