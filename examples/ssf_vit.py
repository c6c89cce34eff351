"""Teach a pretrained ViT to read digits three ways: SSF, linear probing and full fine-tuning.

Prints accuracy on held-out images, seconds, memory and trained parameters of each, then merges
SSF's scales and shifts into the weights, saves the model and checks that it answers the same.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from digits import load_digits, split
from measure import kept_bytes
from partune.nn import ScaleShiftConfig, attach, merge, save_adapter, trainable_parameters


@dataclass(frozen=True)
class Result:
    accuracy: float
    seconds: float
    step_seconds: float
    activations: int  # bytes that a forward keeps for its backward, weights not counted
    trained_bytes: int  # gradients and optimizer state
    parameters: int


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The pretrained backbone under a new head, the same for every method."""
    torch.manual_seed(args.seed)
    return AutoModelForImageClassification.from_pretrained(args.model, num_labels=10)


def prepare(method: str, args: argparse.Namespace) -> PreTrainedModel:
    """A model of which a method's parameters train."""
    model = load(args)
    if method == "SSF":
        attach(model, ScaleShiftConfig())
    elif method == "linear probing":
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    return model


def train(
    model: PreTrainedModel, images: Tensor, labels: Tensor, lr: float, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, list[float]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [  # 1-D parameters, scales and shifts among them, are not decayed
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    generator = torch.Generator().manual_seed(args.seed)
    batches = [
        batch
        for _ in range(args.epochs)
        for batch in torch.randperm(len(labels), generator=generator).split(args.batch_size)
    ][: args.steps]
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    model.train()
    times = []
    for batch in batches:
        start = time.perf_counter()
        output = model(pixel_values=images[batch]).logits
        nn.functional.cross_entropy(output, labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append(time.perf_counter() - start)
    return optimizer, times


@torch.no_grad()
def predict(model: PreTrainedModel, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(pixel_values=batch).logits for batch in images.split(64)])


def run(
    method: str, lr: float, data: tuple[Tensor, ...], args: argparse.Namespace
) -> tuple[PreTrainedModel, Result]:
    images, labels, test_images, test_labels = data
    model = prepare(method, args)
    activations = kept_bytes(model, {"pixel_values": images[: args.batch_size]})
    optimizer, times = train(model, images, labels, lr, args)
    states = [value for state in optimizer.state.values() for value in state.values()]
    count, _ = trainable_parameters(model)
    accuracy = (predict(model, test_images).argmax(-1) == test_labels).float().mean()
    return model, Result(
        accuracy=float(accuracy),
        seconds=sum(times),
        step_seconds=median(times),
        activations=activations,
        trained_bytes=4 * count + sum(value.nbytes for value in states),
        parameters=count,
    )


def print_table(results: dict[str, Result]) -> None:
    rows = (
        ("accuracy on held-out images", lambda r: f"{r.accuracy:.3f}"),
        ("seconds of training", lambda r: f"{r.seconds:.1f}"),
        ("seconds per step, median", lambda r: f"{r.step_seconds:.3f}"),
        ("activations kept, MB", lambda r: f"{r.activations / 1e6:.1f}"),
        ("gradients and optimizer state, MB", lambda r: f"{r.trained_bytes / 1e6:.1f}"),
        ("trained parameters", lambda r: f"{r.parameters:,d}"),
    )
    print(f"\n{'':<36}" + "".join(f"{name:>20}" for name in results))
    for label, cell in rows:
        print(f"{label:<36}" + "".join(f"{cell(result):>20}" for result in results.values()))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Teach a pretrained ViT to read digits, with SSF and two other ways.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="facebook/dinov2-small", help="hub name or folder; offline_models.py")
    add("--output", type=Path, default=Path(".cache/ssf_vit"), help="where the results go")
    add("--size", type=int, default=56, help="the digits are enlarged to this")
    add("--epochs", type=int, default=2)
    add("--steps", type=int, default=None, help="stop each training after so many steps")
    add("--batch-size", type=int, default=32)
    add("--held-out", type=int, default=360, help="how many images are held out")
    add("--lr", type=float, default=2e-3, help="SSF's learning rate")
    add("--probe-lr", type=float, default=5e-3, help="linear probing's")
    add("--full-lr", type=float, default=1e-4, help="full fine-tuning's")
    add("--require-gain", type=float, default=0.02, help="fail if SSF leads probing by less")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    disable_progress_bar()  # transformers' bars for reading and writing files
    set_verbosity_error()  # it warns that the head is new
    data = split(*load_digits(args.size), args.held_out, args.seed)
    print(
        f"{args.model}: {load(args).num_parameters() / 1e6:.1f} M parameters, {len(data[1])} images"
    )
    rates = {"SSF": args.lr, "linear probing": args.probe_lr, "full fine-tuning": args.full_lr}
    results = {}
    for method, lr in rates.items():
        print(f"training with {method}, lr {lr:g}")
        model, results[method] = run(method, lr, data, args)
        if method == "SSF":
            adapted = model
    print_table(results)

    args.output.mkdir(parents=True, exist_ok=True)
    adapter = args.output / "ssf.safetensors"
    save_adapter(adapted, adapter)
    report = merge(adapted, {"pixel_values": data[2][:64]})
    adapted.save_pretrained(args.output / "model")
    reloaded = AutoModelForImageClassification.from_pretrained(args.output / "model")
    same = torch.equal(predict(reloaded, data[2][:64]), predict(adapted, data[2][:64]))
    print(f"\nadapter: {adapter}, {adapter.stat().st_size / 1e6:.2f} MB")
    print(f"merged: {args.output / 'model'}, outputs moved by {report.relative_drift:.1e} at most")

    failures = []
    gain = results["SSF"].accuracy - results["linear probing"].accuracy
    if gain < args.require_gain:
        failures.append(f"SSF leads linear probing by {gain:.3f} only")
    if report.relative_drift > 1e-5:
        failures.append("merging moved the outputs")
    if not same:
        failures.append("the saved model answers differently when loaded again")
    sys.exit("FAILED: " + "; ".join(failures) if failures else None)


if __name__ == "__main__":
    main()
