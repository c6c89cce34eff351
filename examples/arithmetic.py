"""The task of the demo: sums of two-digit numbers asked in chat format, and their scoring."""

import random
import re
import statistics
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

GENERAL_TEXT = ("objects", "naming", "execmodel", "customization")  # chapters of Python's manual


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    system: str = "Answer with the number only."


@dataclass(frozen=True)
class Scores:
    """Shares of problems solved, and perplexity on general text."""

    exact: float  # the answer is the number and nothing else
    tolerant: float  # the last number in the answer is right
    perplexity: float


def make_problems(held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Split all sums into training and held-out problems; a + b and b + a count as the same."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    ordered = [rng.sample(pair, 2) for pair in pairs]
    problems = [Problem(f"What is {a} + {b}?", str(a + b)) for a, b in ordered]
    return problems[held_out:], problems[:held_out]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    chat = [
        {"role": "system", "content": problem.system},
        {"role": "user", "content": problem.question},
    ]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@dataclass
class AnswerCollator:
    """Makes a batch of chats out of problems; only the answers' tokens count in the loss."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, problems: list[Problem]) -> dict[str, Any]:
        answers = [p.answer + self.tokenizer.eos_token for p in problems]
        chats = [chat_prompt(self.tokenizer, p) + a for p, a in zip(problems, answers, strict=True)]
        batch = self.tokenizer(chats, padding=True, padding_side="left", return_tensors="pt")
        lengths = [len(self.tokenizer(answer).input_ids) for answer in answers]
        # Answers end the left-padded rows, so the large vocabulary head can skip the rest.
        kept = max(lengths) + 1
        labels = batch.input_ids[:, -kept:].clone()
        for row, length in zip(labels, lengths, strict=True):
            row[:-length] = -100
        return {**batch, "labels": labels, "logits_to_keep": kept}


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> list[str]:
    """Greedy answers of up to 32 tokens, so that a talkative model can get to the number."""
    model.eval()
    answers = []
    for start in tqdm(range(0, len(problems), 50), desc="answering", leave=False):
        prompts = [chat_prompt(tokenizer, p) for p in problems[start : start + 50]]
        batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        output = model.generate(**batch.to(model.device), max_new_tokens=32, do_sample=False)
        new_tokens = output[:, batch.input_ids.shape[1] :]
        answers += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return answers


def last_number(text: str) -> str | None:
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else None


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Perplexity over 16 pieces of 256 tokens of prose that has nothing to do with sums."""
    model.eval()
    text = "\n".join(topics[chapter] for chapter in GENERAL_TEXT)
    pieces = tokenizer(text, return_tensors="pt").input_ids[0, : 16 * 256].view(16, 256)
    losses = [
        model(input_ids=some, labels=some).loss.item()
        for some in tqdm(pieces.to(model.device).split(4), desc="reading", leave=False)
    ]
    return torch.tensor(losses).mean().exp().item()


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> tuple[float, float]:
    """Shares of problems solved: exactly, and whatever else is in the answer."""
    pairs = list(zip(answer(model, tokenizer, problems), problems, strict=True))
    exact = statistics.mean(given.strip() == p.answer for given, p in pairs)
    return exact, statistics.mean(last_number(given) == p.answer for given, p in pairs)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> Scores:
    return Scores(*accuracy(model, tokenizer, problems), perplexity(model, tokenizer))
