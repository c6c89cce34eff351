"""Images of handwritten digits: 1797 of 8 x 8 pixels, which scikit-learn's package carries."""

import csv
import gzip
import hashlib
import io
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from offline_models import download_wheel

REQUIREMENT = "scikit-learn==1.7.2"
MEMBER = "sklearn/datasets/data/digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "digits.csv.gz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images that models know


def load_digits(size: int, cache: Path = CACHE) -> tuple[Tensor, Tensor]:
    """Images [1797, 3, size, size], enlarged and normalised as ImageNet's, and labels [1797]."""
    if not cache.exists():
        download_digits(cache)
    data = cache.read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != SHA256:
        raise RuntimeError(f"{cache}: sha256 is {digest}, expected {SHA256}; remove the file")
    rows = csv.reader(io.StringIO(gzip.decompress(data).decode()))
    table = torch.tensor([[float(cell) for cell in row] for row in rows])
    images = table[:, :64].view(-1, 1, 8, 8) / 16
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bicubic")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images.clamp(0, 1) - mean) / std, table[:, 64].long()


def download_digits(cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        wheel = download_wheel(REQUIREMENT, "9 MB", Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(MEMBER, scratch)).replace(cache)


def split(images: Tensor, labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, ...]:
    """Training images and labels, and those held out."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:held_out], order[held_out:]
    return images[train], labels[train], images[test], labels[test]
