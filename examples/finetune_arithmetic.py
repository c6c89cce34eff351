"""Teach SmolLM2-135M-Instruct to add, with transformers' Trainer and partune's LiftAdamW.

Prints, before and after: accuracy on held-out problems, perplexity on general text (what was
forgotten), optimizer state and seconds per step, beside torch.optim.AdamW's in the same run.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)
from transformers.utils.logging import disable_progress_bar

from arithmetic import AnswerCollator, Problem, answer, evaluate, make_problems
from measure import Run, StepTimer, count_changed, plot_losses, print_table
from partune.optim import LiftAdamW, lift_groups


def load(model: str | Path) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)


def train(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    steps: int,
    args: argparse.Namespace,
) -> Run:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=problems,
        data_collator=AnswerCollator(tokenizer),
        optimizers=(optimizer, get_linear_schedule_with_warmup(optimizer, 0, steps)),
    )
    timer = StepTimer()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(timer)
    trainer.train()
    return Run.of(trainer, timer, optimizer)


def survives_reload(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
) -> bool:
    """Save the model, load it again and compare logits and greedy answers."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reloaded = load(folder).eval()
    tokens = tokenizer(problems[0].question, return_tensors="pt").to(model.device)
    with torch.no_grad():
        same_logits = torch.equal(reloaded(**tokens).logits, model.eval()(**tokens).logits)
    return same_logits and (
        answer(reloaded, tokenizer, problems) == answer(model, tokenizer, problems)
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Teach a small language model to add.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        help="hub name or folder; see offline_models.py",
    )
    add("--output", type=Path, default=Path(".cache/arithmetic"), help="where the results go")
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=8)
    add("--lr", type=float, default=5e-4, help="LiftAdamW's learning rate")
    add("--adamw-lr", type=float, default=5e-5, help="AdamW's learning rate")
    add("--compare-steps", type=int, default=8, help="AdamW's steps; scored if as many as --steps")
    add("--problems", type=int, default=200, help="how many are held out")
    add("--require-gain", type=float, default=0.25, help="fail if exact accuracy rises by less")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    disable_progress_bar()  # transformers' bars for reading and writing files
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args.model)
    problems, held_out = make_problems(args.problems, args.seed)
    print(f"{args.model}: {model.num_parameters() / 1e6:.1f} M parameters")

    print(f"scoring it on {len(held_out)} held-out problems")
    before = evaluate(model, tokenizer, held_out)

    print(f"training for {args.steps} steps with LiftAdamW, lr {args.lr:g}")
    # was: optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = LiftAdamW(lift_groups(model), lr=args.lr)
    lift = train(model, optimizer, tokenizer, problems, args.steps, args)
    after = evaluate(model, tokenizer, held_out)

    other = load(args.model)
    changed, unselected = count_changed(model, other, optimizer)
    reload_ok = survives_reload(args.output / "model", model, tokenizer, held_out[:16])

    print(f"training all weights for {args.compare_steps} steps with AdamW, lr {args.adamw_lr:g}")
    full_optimizer = torch.optim.AdamW(other.parameters(), lr=args.adamw_lr)
    adamw = train(other, full_optimizer, tokenizer, problems, args.compare_steps, args)
    compare_scores = args.compare_steps == args.steps
    full = evaluate(other, tokenizer, held_out) if compare_scores else None

    print_table(
        {"before": (before, None), "LiftAdamW": (after, lift), "AdamW, all weights": (full, adamw)}
    )
    share = changed / model.num_parameters()
    print(f"\n{share:.1%} of the weights changed, {unselected} outside of the selection")
    plot_losses(args.output / "loss.png", {"LiftAdamW": lift, "AdamW, all weights": adamw})
    print(f"model: {args.output / 'model'}\nloss curve: {args.output / 'loss.png'}")

    failures = []
    if after.exact - before.exact < args.require_gain:
        failures.append(f"exact accuracy rose by {after.exact - before.exact:.3f} only")
    if full and after.perplexity > full.perplexity:
        failures.append("more was forgotten than by training all weights")
    if unselected and args.steps < optimizer.param_groups[0]["refresh_interval"]:
        failures.append("weights changed that were not selected")
    if not reload_ok:
        failures.append("the saved model answers differently when loaded again")
    sys.exit("FAILED: " + "; ".join(failures) if failures else None)


if __name__ == "__main__":
    main()
