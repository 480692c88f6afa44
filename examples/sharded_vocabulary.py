"""Trains a language model whose vocabulary is sharded over processes, beside one that is not.

    torchrun --nproc-per-node 2 examples/sharded_vocabulary.py

Each process has its rows of the output layer, as in Megatron's column-parallel layer, and the same
hidden states. `fastdiv.distributed.linear_cross_entropy` gives it the loss of the whole vocabulary
and its own gradients, without logits in memory. Each process also trains the whole model. If the
two curves, or the layers in the end, differ by more than float32 noise, the script exits with 1.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastdiv
import fastdiv.distributed

VOCABULARY, WIDTH, TOKENS, STEPS, SMOOTHING = 1999, 32, 256, 20, 0.1


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return tokens and the token after each, which a fixed permutation determines."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(VOCABULARY, generator=generator)
    tokens = torch.randint(0, VOCABULARY, (STEPS, TOKENS), generator=generator)
    return [(t, successor[t]) for t in tokens]


def make_model() -> tuple[nn.Embedding, nn.Linear]:
    torch.manual_seed(1)
    return nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)


def cut(layer: nn.Linear, rank: int, world: int) -> nn.Linear:
    """Return this rank's rows of a layer; if they cannot be equal, the first ranks get one more."""
    weight, bias = (v.detach().tensor_split(world)[rank] for v in (layer.weight, layer.bias))
    shard = nn.Linear(WIDTH, len(weight))
    shard.load_state_dict({"weight": weight, "bias": bias})
    return shard


def train(loss, *modules: nn.Module) -> list[float]:
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    curve = []
    for tokens, successors in batches():
        optimizer.zero_grad()
        value = loss(modules[0](tokens), modules[1], successors)
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve


def sharded(hidden: Tensor, layer: nn.Linear, label: Tensor) -> Tensor:
    return fastdiv.distributed.linear_cross_entropy(
        hidden, layer.weight, label, linear_bias=layer.bias, label_smoothing=SMOOTHING
    )


def whole(hidden: Tensor, layer: nn.Linear, label: Tensor) -> Tensor:
    return fastdiv.linear_cross_entropy(
        hidden, layer.weight, label, linear_bias=layer.bias, label_smoothing=SMOOTHING
    )


def main() -> int:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    embedding, layer = make_model()
    shard = cut(layer, rank, world)
    curve = train(sharded, embedding, shard)
    embedding, layer = make_model()
    expected = train(whole, embedding, layer)
    curves = max(abs(a - b) for a, b in zip(curve, expected, strict=True))
    layers = (shard.weight - cut(layer, rank, world).weight).abs().max().item()
    same = curves < 1e-4 and layers < 1e-3
    if rank == 0:
        print(f"{world} processes, {VOCABULARY} classes: loss {curve[0]:.4f} to {curve[-1]:.4f}")
        print(f"the whole layer in one process: {expected[0]:.4f} to {expected[-1]:.4f}")
        print("same curve" if same else f"curves differ by {curves}, layers by {layers}")
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
