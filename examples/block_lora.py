"""Teach SmolLM2-135M-Instruct to add with Block-LoRA, beside LoRA as peft trains it.

Prints accuracy and loss on held-out problems, seconds per step, memory and trained parameters of
both. Then writes Block-LoRA as a LoRA checkpoint, loads that with peft into
the base model and checks that it answers the same.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from arithmetic import AnswerCollator, Problem, accuracy, make_problems
from conversations import answer_loss
from finetune_arithmetic import load, train
from measure import Run, kept_bytes, plot_losses, state_bytes
from partune.integrations.peft import export_lora
from partune.nn import BlockLoRAConfig, attach, trainable_parameters


@dataclass(frozen=True)
class Known:
    """What a model knows of the held-out problems: shares solved, and the loss of the answers."""

    exact: float
    tolerant: float
    loss: float

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
    ) -> "Known":
        return cls(*accuracy(model, tokenizer, problems), answer_loss(model, tokenizer, problems))


@dataclass(frozen=True)
class Trained:
    """A model after its training, and what that took."""

    model: nn.Module
    known: Known
    run: Run
    optimizer: torch.optim.Optimizer
    activations: int  # bytes that a forward keeps for its backward, weights not counted
    parameters: int


def with_lora(model: PreTrainedModel, args: argparse.Namespace) -> PeftModel:
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=args.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def with_block_lora(model: PreTrainedModel, args: argparse.Namespace) -> PreTrainedModel:
    config = BlockLoRAConfig(
        rank=args.rank, blocks=args.blocks, alpha=args.alpha, dropout=args.dropout
    )
    return attach(model, config)


def fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    held_out: list[Problem],
    args: argparse.Namespace,
) -> Trained:
    batch = AnswerCollator(tokenizer)(problems[: args.batch_size])
    activations = kept_bytes(model, on_device(batch, model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    run = train(model, optimizer, tokenizer, problems, args.steps, args)
    known = Known.of(model, tokenizer, held_out)
    count, _ = trainable_parameters(model)
    return Trained(model, known, run, optimizer, activations, count)


def on_device(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def step_seconds(
    trained: dict[str, Trained], batch: dict[str, Any], rounds: int
) -> dict[str, float]:
    """Median seconds of a forward, a backward and an optimizer step, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in trained}
    for turn in range(rounds + 1):
        order = list(trained) if turn % 2 else list(reversed(trained))
        for name in order:
            model, optimizer = trained[name].model.train(), trained[name].optimizer
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # what was learned stays
            inputs = on_device(batch, model)
            began = time.perf_counter()
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    return {name: median(seconds[1:]) for name, seconds in times.items()}


def print_table(before: Known, trained: dict[str, Trained], seconds: dict[str, float]) -> None:
    results = trained.values()
    mb = {name: 4 * t.parameters + state_bytes(t.optimizer) for name, t in trained.items()}
    rows = (
        ("accuracy, exact", before.exact, [t.known.exact for t in results], ".3f"),
        ("accuracy, format-tolerant", before.tolerant, [t.known.tolerant for t in results], ".3f"),
        ("loss of the answers", before.loss, [t.known.loss for t in results], ".3f"),
        ("seconds per step, taking turns", None, list(seconds.values()), ".3f"),
        ("activations kept, MB", None, [t.activations / 1e6 for t in results], ".1f"),
        ("gradients and optimizer state, MB", None, [size / 1e6 for size in mb.values()], ".1f"),
        ("trained parameters", None, [t.parameters for t in results], ",d"),
    )  # fmt: skip
    print(f"\n{'':<36}" + "".join(f"{name:>20}" for name in ("before", *trained)))
    for label, start, values, digits in rows:
        cells = ["-" if value is None else format(value, digits) for value in (start, *values)]
        print(f"{label:<36}" + "".join(f"{cell:>20}" for cell in cells))


@torch.no_grad()
def drift_in_peft(folder: Path, model: nn.Module, inputs: dict[str, Any], base: str) -> float:
    """Largest difference of the logits that peft computes with the checkpoint, relative."""
    loaded = PeftModel.from_pretrained(load(base), folder).eval()
    wanted, got = model.eval()(**inputs).logits, loaded(**inputs).logits
    return float((got - wanted).abs().max() / wanted.abs().max())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Teach a small language model to add with Block-LoRA, beside peft's LoRA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        help="hub name or folder; see offline_models.py",
    )
    add("--output", type=Path, default=Path(".cache/block_lora"), help="where the results go")
    add("--steps", type=int, default=60)
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=2e-3)
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16)
    add("--blocks", type=int, default=2, help="of Block-LoRA")
    add("--dropout", type=float, default=0.0)
    add("--problems", type=int, default=200, help="how many are held out")
    add("--rounds", type=int, default=5, help="of timing, in which the models take turns")
    add("--require-gain", type=float, default=0.1, help="fail if exact accuracy rises by less")
    add(
        "--short", action="store_true", help="a minute: few steps and problems, to see that it runs"
    )
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.short:
        args.steps, args.batch_size, args.problems, args.rounds = 3, 2, 8, 2
        args.require_gain = -1.0
    return args


def main() -> None:
    args = parse_args()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    problems, held_out = make_problems(args.problems, args.seed)
    print(f"scoring {args.model} on {len(held_out)} held-out problems")
    before = Known.of(load(args.model), tokenizer, held_out)

    trained = {}
    for name, prepare in (("LoRA, peft", with_lora), ("Block-LoRA", with_block_lora)):
        torch.manual_seed(args.seed)
        model = prepare(load(args.model), args)
        print(f"training with {name} for {args.steps} steps, lr {args.lr:g}")
        trained[name] = fit(model, tokenizer, problems, held_out, args)
    batch = AnswerCollator(tokenizer)(problems[: args.batch_size])
    print_table(before, trained, step_seconds(trained, batch, args.rounds))
    args.output.mkdir(parents=True, exist_ok=True)
    plot_losses(args.output / "loss.png", {name: t.run for name, t in trained.items()})

    ours, folder = trained["Block-LoRA"], args.output / "adapter"
    export_lora(ours.model, folder)
    drift = drift_in_peft(folder, ours.model, on_device(batch, ours.model), args.model)
    print(f"\nLoRA checkpoint for peft: {folder}; its logits in peft differ by {drift:.1e}")
    print(f"loss curve: {args.output / 'loss.png'}")

    failures = []
    if ours.known.exact - before.exact < args.require_gain:
        failures.append(f"exact accuracy rose by {ours.known.exact - before.exact:.3f} only")
    if drift > 1e-5:
        failures.append("peft computes something else with the exported checkpoint")
    sys.exit("FAILED: " + "; ".join(failures) if failures else None)


if __name__ == "__main__":
    main()
