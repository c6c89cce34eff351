"""Two rounds of half fine-tuning: sums first, then small talk, and what each round forgot.

Trains SmolLM2-135M-Instruct twice over the same rounds, once all of its weights with torch's AdamW
and once half of them with HalfAdamW, another half in the second round. Scores after each round what
was learned in both, and perplexity on general text.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from arithmetic import Problem, evaluate, make_problems
from conversations import answer_loss, make_conversations
from finetune_arithmetic import load, train
from measure import Run
from partune.optim import HalfAdamW
from partune.selection import Half

ROUNDS = ("sums", "small talk")


@dataclass(frozen=True)
class Tasks:
    """Training and held-out problems of both rounds."""

    training: tuple[list[Problem], list[Problem]]
    held_out: tuple[list[Problem], list[Problem]]


@dataclass(frozen=True)
class Known:
    """What a model knows: sums right (format-tolerant), the loss of answers, general text."""

    sums: float
    talk: float
    perplexity: float


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Tasks) -> Known:
    sums, talk = tasks.held_out
    scores = evaluate(model, tokenizer, sums)
    return Known(scores.tolerant, answer_loss(model, tokenizer, talk), scores.perplexity)


def run_rounds(
    half: bool, tokenizer: PreTrainedTokenizerBase, tasks: Tasks, args: argparse.Namespace
) -> tuple[list[Known], list[Run]]:
    """Train through both rounds with one optimizer, scoring after each."""
    model = load(args.model)
    known, runs = [], []
    if half:
        optimizer = HalfAdamW(model, lr=args.lr, weight_decay=0.0, plan=Half(args.seed))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    for number, (name, problems) in enumerate(zip(ROUNDS, tasks.training, strict=True)):
        if half and number > 0:
            optimizer.next_round(args.seed + number)
        if half:
            print(str(optimizer.plan).splitlines()[0])
        for group in optimizer.param_groups:
            group["lr"] = args.lr
            group.pop("initial_lr", None)  # of the last round's schedule
        print(f"round {number + 1}, {name}: {args.steps} steps")
        runs.append(train(model, optimizer, tokenizer, problems, args.steps, args))
        known.append(score(model, tokenizer, tasks))
    return known, runs


def print_rounds(before: Known, full: list[Known], half: list[Known]) -> None:
    """A column for each state, and what the second round and both rounds took away."""
    columns = {
        "before": before, "full, 1": full[0], "full, 2": full[1],
        "half, 1": half[0], "half, 2": half[1],
    }  # fmt: skip
    print(f"\n{'after round':<34}" + "".join(f"{name:>10}" for name in columns))
    for label, field in (
        ("accuracy on held-out sums", "sums"),
        ("loss on held-out small talk", "talk"),
        ("perplexity on general text", "perplexity"),
    ):
        cells = "".join(f"{getattr(known, field):>10.3f}" for known in columns.values())
        print(f"{label:<34}{cells}")
    for name, known in (("full", full), ("half", half)):
        print(
            f"forgot, {name}: round 1 {known[0].perplexity - before.perplexity:+.2f} perplexity; "
            f"round 2 {known[1].perplexity - known[0].perplexity:+.2f} perplexity and "
            f"{known[0].sums - known[1].sums:+.3f} of the sums"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Two rounds of half fine-tuning, beside full fine-tuning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        help="hub name or folder; see offline_models.py",
    )
    add("--output", type=Path, default=Path(".cache/half_rounds"), help="where the results go")
    add("--steps", type=int, default=80, help="of each round")
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=1e-4)
    add("--problems", type=int, default=100, help="how many of each task are held out")
    add(
        "--short", action="store_true", help="a minute: few steps and problems, to see that it runs"
    )
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.short:
        args.steps, args.batch_size, args.problems = 3, 2, 8
    return args


def main() -> None:
    args = parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sums = make_problems(args.problems, args.seed)
    talk = make_conversations(args.problems, args.seed, args.output)
    tasks = Tasks(training=(sums[0], talk[0]), held_out=(sums[1], talk[1]))
    before = score(load(args.model), tokenizer, tasks)
    full, full_runs = run_rounds(False, tokenizer, tasks, args)
    half, half_runs = run_rounds(True, tokenizer, tasks, args)
    print_rounds(before, full, half)
    for name, runs in (("full", full_runs), ("half", half_runs)):
        print(
            f"{name}: {runs[1].step_seconds:.2f} s a step, of which the optimizer "
            f"{runs[1].optimizer_seconds:.3f} s; state {runs[1].state_mb:.0f} MB"
        )
    learned = args.short or (half[0].sums > before.sums and half[1].talk < before.talk)
    sys.exit(None if learned else "FAILED: half of the weights learned nothing")


if __name__ == "__main__":
    main()
