"""Turn the ONNX file of a ViT of Dinov2's architecture into a Hugging Face folder."""

import re
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import Dinov2Config, Dinov2Model

# ONNX's names of a layer's parts, and those of transformers
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def convert(file: Path, folder: Path) -> None:
    """Read the backbone's weights, build the model around them and save it.

    Biases and norms have their names in the file. The matrices are constants of MatMul nodes,
    transposed; the nodes have the names.
    """
    graph = onnx.load(file).graph
    arrays = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    state = {
        name.removeprefix("backbone."): value
        for name, value in arrays.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        match = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.*)/MatMul", node.name)
        if node.op_type == "MatMul" and match and node.input[1] in arrays:
            state[match[1].replace("/", ".") + ".weight"] = arrays[node.input[1]].T
    width = state["embeddings.cls_token"].shape[-1]
    positions = [v for n, v in arrays.items() if n.startswith("onnx::") and v.dim() == 3]
    positions.sort(key=lambda value: value.shape[1])  # the class token's, then the patches'
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, width)
    model = Dinov2Model(config_of(state))
    model.load_state_dict({renamed(name): value for name, value in state.items()})
    model.save_pretrained(folder)


def config_of(state: dict[str, torch.Tensor]) -> Dinov2Config:
    width, _, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    grid = round((state["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in state if "layer." in n),
        num_attention_heads=width // 64,
        patch_size=patch,
        image_size=grid * patch,
    )


def renamed(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name
