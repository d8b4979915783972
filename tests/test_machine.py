"""How a machine is called in reports and proofs."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyexport import versions

EPYC = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: fpu sse2\n"
LITTLE = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd05\n"
BIG = "processor\t: 7\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"
APPLE = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x61\nCPU part\t: 0xd05\n"
OLD = "processor\t: 0\nmodel name\t: ARMv6-compatible processor\nCPU implementer\t: 0x41\nCPU part\t: 0xb76\n"


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "name"),
    [
        ("x86_64", EPYC, "AMD EPYC"),
        ("i686", EPYC, "AMD EPYC"),
        ("aarch64", f"{LITTLE}\n{BIG}", "aarch64 (Cortex-A76)"),
        ("armv7l", BIG, "armv7l (Cortex-A76)"),
        ("armv6l", OLD, "ARMv6-compatible processor"),
        ("aarch64", APPLE, "aarch64"),
        ("aarch64", EPYC, "aarch64 emulated on AMD EPYC"),
        ("x86_64", BIG, "x86_64 emulated on Cortex-A76"),
        ("x86_64", APPLE, "x86_64 emulated on arm"),
        ("riscv64", "processor\t: 0\nisa\t\t: rv64imafdc\n", "riscv64"),
        ("aarch64", None, "aarch64"),
    ],
)
def test_a_processor_is_called_by_its_name_and_an_emulated_one_by_both(
    architecture: str, cpuinfo: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(versions, "_CPUINFO", file)
    monkeypatch.setattr(versions.sys, "platform", "linux")
    monkeypatch.setattr(versions.platform, "machine", lambda: architecture)
    monkeypatch.setattr(versions.platform, "processor", lambda: "")
    assert versions.processor() == name


@pytest.mark.parametrize(
    ("architecture", "brand", "name"),
    [
        ("arm64", "Apple M3", "Apple M3"),
        ("x86_64", "Apple M3", "x86_64 emulated on Apple M3"),
        ("x86_64", "Intel(R) Core(TM) i7", "Intel(R) Core(TM) i7"),
        ("arm64", "", "arm64"),
    ],
)
def test_a_program_for_intel_on_an_apple_processor_is_emulated(
    architecture: str, brand: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(f"#!/bin/sh\necho '{brand}'\n")
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(versions.sys, "platform", "darwin")
    monkeypatch.setattr(versions.platform, "machine", lambda: architecture)
    monkeypatch.setattr(versions.platform, "processor", lambda: "")
    assert versions.processor() == name
