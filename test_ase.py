"""All tests: each proves by an independent route, on tiny sizes. `pytest test_ase.py`, under three
minutes."""

import argparse
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from scipy.spatial import cKDTree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ase
import data
import evaluate
import train
from data import IGNORE, PALETTE, TASKS, Task, boundaries, legend_of, paint, sheet, thin
from evaluate import THRESHOLDS, draw_curves, draw_edges, draw_experts, draw_predictions
from evaluate import edge_counts, ods_f, suppress, thin_words, threshold_bits

rng = np.random.default_rng(0)
ROOT = Path(__file__).parent

# ------------------------------------------------------------------------------------------------ the model

# T = 2, L = 5 tokens, D = 18, N = 7, S = 2, K = 3, R = 4; B is 3. Equalities are claimed in float64.
SMALL = dict(image=8, patch=4, dim=18, depth=2, heads=3, tasks={"semseg": 5, "edge": 1}, experts=7, topk=3,
             shared=2, rank=4, head_dim=8)
SETTINGS = [(7, 3, 0), (7, 1, 1), (7, 3, 2), (3, 1, 2), (5, 5, 0)]  # N, K, S
TABLE1 = ["103.52", "106.77", "108.25", "106.77", "108.25", "111.20"]  # millions, by hand
both_gatings = pytest.mark.parametrize("gating", ["joint", "fixed"])


def small(**changes):
    return ase.Config(**(SMALL | changes))


def experts_of(config, layer=ase.LoRAExperts):
    """The expert layer that a block of this configuration has, or an alternative to it."""
    names = ("dim", "experts", "topk", "shared", "rank", "gating", "noise")
    return layer(tasks=config.tasks, **{name: getattr(config, name) for name in names})


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module):
    """The module in float64 with no parameter left at zero or one."""
    for i, p in enumerate(module.parameters()):
        p.data = 0.5 * random(*p.shape, seed=i)
    return module.double().eval()


def gates_by_hand(z, shared, topk, gating):
    """Eq. 1–9 for one token, in plain floats."""
    sparse = range(shared, len(z))
    kept = sorted(sparse, key=lambda i: z[i], reverse=True)[:topk]
    if gating == "joint":
        active = [*range(shared), *kept]
        total = sum(math.exp(z[i]) for i in active)
        return [math.exp(z[i]) / total if i in active else 0 for i in range(len(z))]
    total = sum(math.exp(z[i]) for i in sparse)
    return [1 if i < shared else math.exp(z[i]) / total if i in kept else 0 for i in range(len(z))]


@both_gatings
@pytest.mark.parametrize("experts, topk, shared", SETTINGS)
def test_gates_are_the_equations_written_out(experts, topk, shared, gating):
    z = 2 * random(3, 11, experts)
    expected = [[gates_by_hand(token, shared, topk, gating) for token in row] for row in z.tolist()]
    np.testing.assert_allclose(ase.gate(z, shared, topk, gating).numpy(), expected, rtol=0, atol=1e-13)


@both_gatings
@pytest.mark.parametrize("experts, topk, shared", SETTINGS)
def test_exactly_k_sparse_gates_open_also_when_logits_tie(experts, topk, shared, gating):
    for z in (torch.zeros(13, experts), random(13, experts).round()):
        gates = ase.gate(z, shared, topk, gating)
        assert (gates[:, shared:] > 0).sum(1).tolist() == [topk] * 13
        assert (gates[:, :shared] > 0).all()


@both_gatings
def test_gates_are_computed_in_float32_and_survive_huge_logits(gating):
    z = (3 * random(101, 7)).bfloat16()
    expected = ase.gate(z.double(), 2, 3, gating)
    torch.testing.assert_close(ase.gate(z, 2, 3, gating), expected.float(), rtol=1e-6, atol=1e-7)
    huge = ase.gate(torch.tensor([1e4, -1e4, 2e4, 0]), 1, 2, gating)
    assert huge.tolist() == [0 if gating == "joint" else 1, 0, 1, 0]


def test_the_defaults_are_the_papers():
    c = ase.Config()
    assert (c.experts, c.topk, c.shared, c.rank, c.gating, c.lora) == (16, 3, 1, 4, "joint", 4)
    assert (c.image, c.patch, c.dim, c.depth, c.heads, c.head_dim) == (224, 16, 768, 12, 12, 256)
    assert len(c.tasks) == 5 and sum(c.tasks.values()) == 33
    loras = [ase.Config(**change).lora for change in (dict(experts=0), dict(experts=0, lora=2), dict(lora=0))]
    assert loras == [0, 2, 0]
    with pytest.raises(FrozenInstanceError):
        c.topk = 5
    c.tasks.clear()
    assert len(ase.Config().tasks) == 5  # no two share their default


@pytest.mark.parametrize("change, told", [
    (dict(topk=0), "1 to 15"), (dict(topk=16), "1 to 15"), (dict(topk=3, shared=14), "1 to 2"),
    (dict(shared=16), "at most 15"), (dict(shared=-1), "shared"), (dict(experts=-1), "experts"),
    (dict(rank=0), "rank"), (dict(lora=-1), "lora"), (dict(depth=0), "depth"), (dict(head_dim=0), "head_dim"),
    (dict(gating="soft"), "joint or fixed"), (dict(image=216, patch=12), "power of two"),
    (dict(patch=1), "power of two"), (dict(image=225), "240"), (dict(image=0), "image"),
    (dict(heads=5), "5 attention heads"), (dict(experts=2.5), "2.5"), (dict(topk=True), "True"),
    (dict(dim="768"), "'768'"), (dict(tasks={}), "task"), (dict(tasks=["edge"]), "task"),
    (dict(tasks={"edge": 0}), "edge"), (dict(tasks={"edge": 1.5}), "1.5"),
    (dict(tasks={"a.b": 1}), "a.b"), (dict(experts=0, depth=-3), "depth"), (dict(experts=10**9), "experts"),
    (dict(image=100_000), "image"), (dict(tasks={"edge": 10**9}), "edge"), (dict(noise=-0.5), "-0.5"),
    (dict(noise=math.nan), "nan"), (dict(noise=math.inf), "inf"), (dict(noise=True), "True"),
    (dict(noise=None), "noise")])
def test_a_bad_configuration_is_one_line_with_its_rule(change, told):
    with pytest.raises(ValueError) as error:
        ase.Config(**change)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [dict(topk=99, shared=99), dict(topk=-1, shared=-1, rank=None)])
def test_without_experts_k_s_and_r_do_not_matter(change):
    assert ase.count(ase.ASE(small(experts=0, **change))) == ase.count(ase.ASE(small(experts=0)))


@both_gatings
@pytest.mark.parametrize("experts, topk, shared, rank", [(7, 3, 2, 4), (5, 2, 0, 1), (3, 1, 2, 2)])
def test_fused_experts_equal_the_loop_in_output_and_gradients(experts, topk, shared, rank, gating):
    config = small(experts=experts, topk=topk, shared=shared, rank=rank, gating=gating)
    layer = randomise(experts_of(config))
    x = random(2, 3, 5, 18).requires_grad_()
    fused, loop = layer(x)[0], layer.reference(x)
    torch.testing.assert_close(fused, loop, rtol=1e-10, atol=1e-11)
    of = [x, *layer.router.values(), layer.down, layer.up]
    weight = random(*x.shape, seed=2)
    expected = torch.autograd.grad((loop * weight).sum(), of)
    for found, gradient in zip(torch.autograd.grad((fused * weight).sum(), of), expected):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-9)


@both_gatings
def test_update_and_routing_are_what_numpy_finds(gating):
    """Σ g_i B_i A_i x by matrices; routing is a mean over B·L tokens, shared first, probs before top-k."""
    layer = randomise(experts_of(small(gating=gating)))
    x = random(2, 3, 5, 18)
    update, probs, gates = (y.detach().numpy() for y in layer(x))
    down, up = (p.detach().numpy() for p in (layer.down, layer.up))
    for t, router in enumerate((layer.router.semseg, layer.router.edge)):
        z = x[t].numpy() @ router.detach().numpy()
        g = np.array([[gates_by_hand(token, 2, 3, gating) for token in image] for image in z.tolist()])
        expected = sum(g[..., i:i + 1] * (x[t].numpy() @ (up[i].T @ down[i]).T) for i in range(7))
        np.testing.assert_allclose(update[t], expected, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(gates[t], g.mean((0, 1)), rtol=1e-9)
        softmax = np.exp(z[..., 2:]) / np.exp(z[..., 2:]).sum(-1, keepdims=True)
        np.testing.assert_allclose(probs[t], softmax.mean((0, 1)), rtol=1e-9)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_noise_has_its_learned_size_in_training_and_is_absent_in_evaluation(factor):
    """20,000 copies of a token: the spread of a logit is softplus(W_noise x) + 0.01, its mean the logit."""
    torch.manual_seed(0)
    layer = randomise(experts_of(small(noise=factor))).train()
    for p in layer.router_noise.values():
        p.data *= 0.1
    token = random(2, 1, 1, 18)
    copies = token.expand(2, 4, 5000, 18)
    z = layer.logits(copies).detach()
    clean, raw = (torch.stack([x[0, 0] @ p.detach() for x, p in zip(token, matrices.values())])
                  for matrices in (layer.router, layer.router_noise))                    # (T, N)
    sigma = factor * (torch.log(1 + torch.exp(raw)) + 0.01)
    torch.testing.assert_close(z.std(1), sigma, rtol=0.03, atol=0)
    assert ((z.mean(1) - clean).abs() < 5 * sigma / math.sqrt(20_000)).all()
    for x, p in zip(token[:, 0, 0], layer.router_noise.values()):
        p.data = -1e3 * torch.sign(x)[:, None].expand(18, 7)
    torch.testing.assert_close(layer.logits(copies).std(1), 0 * sigma + factor * 0.01, rtol=0.03, atol=0)
    torch.testing.assert_close(layer.eval().logits(token)[:, 0], clean)


def test_without_noise_there_is_no_matrix_for_it_and_no_random_number():
    layer = randomise(experts_of(small(noise=0.0))).train()
    assert [name for name, _ in layer.named_parameters()] == ["down", "up", "router.semseg", "router.edge"]
    x, state = random(2, 3, 5, 18), torch.get_rng_state()
    torch.testing.assert_close(layer.logits(x), torch.stack([y.flatten(0, 1) @ p for y, p in
                                                             zip(x, layer.router.values())]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fresh_layer_starts_as_the_paper_page_says():
    layer, linear = experts_of(small(dim=300)), ase.LoRALinear(300, 7, 4)
    # an optimiser's state goes by this order
    assert [name for name, _ in layer.named_parameters()] == [
        "down", "up", "router.semseg", "router.edge", "router_noise.semseg", "router_noise.edge"]
    assert all(p.eq(0).all() for p in (layer.up, *layer.router_noise.values(), linear.lora_up))
    assert all(0.018 < p.std() < 0.022 for p in layer.router.values())
    for down in (layer.down, linear.lora_down):  # Kaiming-uniform with a = √5
        assert 0.95 < down.abs().max() * math.sqrt(300) <= 1.0001


def test_attention_is_a_softmax_written_out():
    attention = randomise(ase.Attention(small(lora=0)))
    x = random(2, 3, 5, 18)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(18, -1)
    heads = []
    for h in (slice(0, 6), slice(6, 12), slice(12, 18)):
        scores = torch.exp(q[..., h] @ k[..., h].mT / math.sqrt(6))
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., h])
    expected = torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-9, atol=1e-9)


def test_lora_adds_the_product_of_its_matrices_to_the_weight():
    layer = randomise(ase.LoRALinear(7, 11, 3))
    x = random(2, 3, 5, 7)
    merged = layer.weight + layer.lora_up @ layer.lora_down
    torch.testing.assert_close(layer(x), x @ merged.T + layer.bias)


def torch_block(block):
    """PyTorch's own encoder layer with the weights of ours; in training mode, off its fused path."""
    theirs = nn.TransformerEncoderLayer(18, 3, 72, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    theirs.double()
    for to, ours in ((theirs.norm1, block.norm1), (theirs.norm2, block.norm2),
                     (theirs.linear1, block.mlp.fc1), (theirs.linear2, block.mlp.fc2),
                     (theirs.self_attn.out_proj, block.attn.proj)):
        to.load_state_dict(ours.state_dict())
    theirs.self_attn.in_proj_weight.data = block.attn.qkv.weight.data
    theirs.self_attn.in_proj_bias.data = block.attn.qkv.bias.data
    return theirs


def test_the_plain_vit_from_the_patches_to_the_final_norm():
    """Patches cut by slicing, the class token first, PyTorch's encoder layers, the norm written out.

    All is small, so that LayerNorm's eps shows: 1e-5 in place of 1e-6 is off by 1e-2.
    """
    model = randomise(ase.ASE(small(experts=0)))
    images = random(3, 3, 8, 8)
    for p in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token, model.pos_embed):
        p.data *= 0.01
    cut = torch.stack([images[:, :, i:i + 4, j:j + 4].flatten(1) for i in (0, 4) for j in (0, 4)], 1)
    patches = cut @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    x = torch.cat([model.cls_token.expand(3, 1, 18), patches], 1) + model.pos_embed
    for block in model.blocks:
        x = torch_block(block)(x)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = x * model.norm.weight + model.norm.bias
    torch.testing.assert_close(model.features(images)[0], expected[None], rtol=1e-8, atol=1e-8)


def test_a_block_adds_its_experts_to_the_ffn():
    """Eq. 10 with the loop: the experts see what the FFN sees."""
    block = randomise(ase.Block(small()))
    x = random(2, 3, 5, 18)
    y = x + block.attn(block.norm1(x))
    ffn, update = block.mlp(block.norm2(y)), block.experts.reference(block.norm2(y))
    found, row = block(x)
    torch.testing.assert_close(found, y + ffn + update, rtol=1e-9, atol=1e-9)
    for t in range(2):
        torch.testing.assert_close(row.power[t], torch.stack([(update[t] ** 2).mean(), (ffn[t] ** 2).mean()]))


@pytest.mark.parametrize("patch", [2, 4, 16])
def test_heads_are_as_large_as_the_image_and_the_closed_formula(patch):
    head = ase.Head(small(image=3 * patch, patch=patch), 5)
    assert head(torch.randn(2, 10, 18)).shape == (2, 5, 3 * patch, 3 * patch)
    assert sum(getattr(m, "kernel_size", 0) == (3, 3) for m in head.layers) == math.log2(patch)
    with torch.device("meta"):
        assert sum(p.numel() for p in ase.Head(ase.Config(), patch).parameters()) == 3_543_552 + 257 * patch


def test_a_head_sees_its_patches_in_place_and_not_the_class_token():
    head = randomise(ase.Head(small(image=32), 1))
    tokens = random(1, 65, 18)
    other = tokens.clone()
    other[:, 0] += 1
    assert torch.equal(head(tokens), head(other))
    other[:, 1 + 1 * 8 + 6] += 5 * random(18)  # row 1, column 6 of 8 × 8
    row, column = divmod((head(tokens) - head(other)).abs().argmax().item(), 32)
    assert row < 16 <= column


def test_parameters_by_part_are_the_closed_formula_whatever_the_tasks_are_called():
    d, n, r, t, blocks, w = 18, 7, 4, 2, 2, 8
    vit = (3 * 16 * d + d) + d + 5 * d + blocks * (12 * d * d + 9 * d + 4 * d) + 2 * d
    heads = t * (2 * d + (9 * d * w + w) + (9 * w * w + w) + 4 * w) + (w + 1) * (5 + 1)
    expected = {"backbone": (vit, 0), "heads": (heads, heads), "embeddings": (t * d, t * d), "others": (0, 0)}
    sizes = {"LoRA": 4 * (4 + 2 + 5 + 5) * d, "experts": 2 * n * r * d, "routers": 2 * t * d * n}
    expected |= {name: (blocks * size, blocks * size) for name, size in sizes.items()}
    assert ase.count(ase.ASE(small())) == expected
    assert ase.count(ase.ASE(small(tasks={"lora_": 5, "task_embedding": 1}))) == expected


@both_gatings
def test_a_fresh_model_is_its_frozen_backbone_for_every_task(gating):
    model = ase.ASE(small(gating=gating)).double().eval()
    plain = ase.ASE(small(experts=0)).double()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    images = random(3, 3, 8, 8)
    expected = plain.features(images)[0].expand(2, 3, 5, 18)
    torch.testing.assert_close(model.features(images)[0], expected, rtol=0, atol=1e-12)


def vit_names(depth):
    """The parameters of a ViT of timm, without its classifier."""
    layers = ["patch_embed.proj", "norm"]
    for i in range(depth):
        layers += [f"blocks.{i}.{x}" for x in "norm1 attn.qkv attn.proj norm2 mlp.fc1 mlp.fc2".split()]
    return {"cls_token", "pos_embed"} | {f"{x}.{kind}" for x in layers for kind in ("weight", "bias")}


class Adapted(ase.Block):
    """A reader's block: an adapter after the experts."""

    def __init__(self, config):
        super().__init__(config)
        self.adapter = nn.Linear(config.dim, config.dim)

    def forward(self, x):
        x, *routing = super().forward(x)
        return x + self.adapter(x), *routing


@pytest.mark.parametrize("change", [dict(), dict(lora=0)])
def test_what_a_reader_adds_is_trained_counted_and_not_asked_of_a_file(change, tmp_path, monkeypatch):
    plain = ase.ASE(small(**change))
    write(tmp_path / "weights", backbone_of(small()))
    monkeypatch.setattr(ase, "Block", Adapted)
    model = ase.ASE(small(**change))
    model.loss_weights = nn.Parameter(torch.ones(5))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == (set() if change else vit_names(2))
    added = 2 * (18 * 18 + 18) + 5
    assert ase.count(model) == ase.count(plain) | {"others": (added, added)}
    assert f"{len(vit_names(2))} tensors loaded" in ase.load_backbone(model, tmp_path / "weights")
    sum(p.sum() for p in model(torch.randn(3, 3, 8, 8))[0].values()).backward()
    assert model.blocks[1].adapter.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("without", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_in_some_blocks_only(without, checkpointing):
    """As if the others' experts added nothing; `Routing` is of the blocks that have them."""
    full, model = (randomise(ase.ASE(small(depth=3))) for _ in range(2))
    for i in without:
        model.blocks[i].experts = None
        full.blocks[i].experts.up.data.zero_()
    model.checkpointing = checkpointing
    images, kept = random(3, 3, 8, 8), [i for i in range(3) if i not in without]
    tokens, routing = torch.compile(model.features, backend="eager", fullgraph=True)(images)
    expected, whole = full.features(images)
    torch.testing.assert_close(tokens, expected, rtol=1e-9, atol=1e-9)
    for found, y in zip(routing, whole, strict=True):
        torch.testing.assert_close(found, y[kept] if kept else torch.zeros(0, 2, 0, dtype=y.dtype))
    predictions, routing = model.train()(images)
    information = ase.mutual_information(routing.probs)
    assert information.shape == (len(kept),)
    (sum(p.sum() for p in predictions.values()) - information.sum()).backward()
    assert all(model.blocks[i].experts.router.edge.grad.abs().sum() > 0 for i in kept)


def test_a_loss_reaches_the_shared_experts_but_nothing_of_another_task():
    model = randomise(ase.ASE(small())).train()
    model(random(3, 3, 8, 8))[0]["edge"].square().mean().backward()
    layers = [block.experts for block in model.blocks]
    for owned in [model.task_embedding, *(p for layer in layers for p in (layer.router, layer.router_noise))]:
        assert owned.semseg.grad.eq(0).all() and owned.edge.grad.abs().sum() > 0
    for layer in layers:
        assert layer.up.grad[:2].abs().sum((1, 2)).gt(0).all()
        assert layer.down.grad[:2].abs().sum((1, 2)).gt(0).all()
    for name, p in model.named_parameters():
        if name.startswith("heads.semseg") or ase.part(name) == "backbone":
            assert p.grad is None, name


@pytest.mark.parametrize("change", [dict(), dict(experts=0)])
def test_predictions_are_each_tasks_head_on_its_own_tokens(change):
    model = randomise(ase.ASE(small(**change)))
    predictions, _ = model(random(3, 3, 8, 8))
    tokens, _ = model.features(random(3, 3, 8, 8))
    assert list(predictions) == ["semseg", "edge"] and predictions["semseg"].shape == (3, 5, 8, 8)
    torch.testing.assert_close(predictions["semseg"], model.heads["semseg"](tokens[0]))
    torch.testing.assert_close(predictions["edge"], model.heads["edge"](tokens[-1]))


def test_mutual_information_is_its_definition_and_has_its_extremes():
    """Zero when tasks route alike, log T when no two share an expert."""
    probs = random(3, 5, 7).softmax(-1)
    for p, found in zip(probs.numpy(), ase.mutual_information(probs), strict=True):
        expected = sum(p[t, i] / 5 * np.log(p[t, i] / p[:, i].mean()) for t in range(5) for i in range(7))
        assert found.item() == pytest.approx(expected, rel=1e-10)
    assert ase.mutual_information(probs[:, :1].expand(3, 5, 7)).abs().max() < 1e-12
    assert ase.mutual_information(torch.eye(5, 7)[None]).item() == pytest.approx(math.log(5), rel=1e-6)


def test_tokens_and_routing_have_their_shapes():
    """T = 2, B = 3, L = 5, seven blocks, D = 17, N = 13, N − S = 11."""
    config = dict(depth=7, dim=17, heads=1, experts=13)
    tokens, routing = ase.ASE(small(**config)).features(torch.randn(3, 3, 8, 8))
    assert (tokens.shape, routing.probs.shape, routing.gates.shape) == ((2, 3, 5, 17), (7, 2, 11), (7, 2, 13))
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(7, 2))
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(7, 2))
    tokens, routing = ase.ASE(small(**config | dict(experts=0))).features(torch.randn(3, 3, 8, 8))
    assert (tokens.shape, routing.probs.shape, routing.gates.shape) == ((1, 3, 5, 17), (0, 2, 0), (0, 2, 0))
    assert ase.mutual_information(routing.probs).shape == (0,)


@pytest.mark.parametrize("change", [dict(), dict(experts=0, lora=2)])
def test_checkpointing_computes_twice_and_changes_nothing(monkeypatch, change):
    calls, results, ffn = [], [], ase.FFN.forward
    monkeypatch.setattr(ase.FFN, "forward", lambda self, x: calls.append(self) or ffn(self, x))
    for checkpointing, computed in ((False, 2), (True, 2 + 4)):
        model = randomise(ase.ASE(small(**change))).train()
        model.checkpointing = checkpointing
        torch.manual_seed(3)  # the same router noise
        predictions, routing = model(random(3, 3, 8, 8))
        sum(p.square().mean() for p in [*predictions.values(), routing.probs, routing.gates]).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([*predictions.values(), *routing, *gradients])
        assert len(calls) == computed
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", [dict(), dict(gating="fixed"), dict(experts=0)])
def test_the_model_compiles_as_one_graph(change):
    model = ase.ASE(small(**change))
    images = torch.randn(2, 3, 8, 8)
    for mode in (model.train(), model.eval()):
        torch.manual_seed(3)
        expected, _ = mode(images)
        torch.manual_seed(3)
        found, _ = torch.compile(mode, backend="eager", fullgraph=True)(images)  # raises at a graph break
        torch.testing.assert_close(found, expected)
        sum(x.sum() for x in found.values()).backward()


class NoQuestions(TorchDispatchMode):
    """Refuses what makes the host wait for the device: `.item()`, `bool()`, a mask as index and their like.
    (`.cpu()` and `.tolist()` leave no trace on a CPU.)"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indices = args[1] if name.startswith(("aten.index.", "aten.index_put")) else ()
        asking = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        masks = [i for i in indices if i is not None and i.dtype == torch.bool]
        if masks or any(word in name for word in asking):
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(mini):
    """From the planes of the maps to the changed weights, as in train.py's loop; logging comes after."""
    model = ase.ASE(ase.Config(image=32, dim=12, depth=2, heads=2, head_dim=8, experts=5, topk=2, rank=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    canvas = data.PascalContext(mini, "train", 32).canvas(range(3))
    warps = data.random_warps(3, torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="waits"), NoQuestions():
        canvas[0].any().item()
    with pytest.raises(AssertionError, match="waits"), NoQuestions():
        canvas[0][canvas[0] > 3]
    before = model.heads["sal"].layers[0].weight.clone()
    with NoQuestions():
        batch = data.warp(*canvas, 32, "imagenet", target_to_source=warps)
        predictions, routing = model(batch.images)
        losses = evaluate.losses(predictions, batch.targets, evaluate.count_pixels(batch.targets))
        (sum(losses.values()) - ase.mutual_information(routing.probs).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.GRAD_CLIP)
        optimizer.step()
    assert (model.heads["sal"].layers[0].weight != before).any()


def test_routers_stay_in_float32_under_autocast_and_in_a_model_of_bfloat16():
    model, x = ase.ASE(small()).eval(), torch.randn(2, 3, 5, 18)
    with torch.autocast("cpu", torch.bfloat16):
        z = model.blocks[0].experts.logits(x)
        routing = model.features(torch.randn(3, 3, 8, 8))[1]
    routers = torch.stack([*model.blocks[0].experts.router.values()])
    torch.testing.assert_close(z, x.flatten(1, 2) @ routers)
    half = experts_of(small()).bfloat16()
    update, probs, gates = half(x.bfloat16())
    assert update.dtype == torch.bfloat16
    assert {y.dtype for y in (*routing, probs, gates)} == {torch.float32}
    expected = x.bfloat16().float().flatten(1, 2) @ torch.stack([*half.router.values()]).float()
    torch.testing.assert_close(half.eval().logits(x.bfloat16()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_computes_what_a_cpu_does():
    results = []
    for device in ("cpu", "cuda"):
        model = randomise(ase.ASE(small())).to(device)
        predictions, routing = model(random(3, 3, 8, 8).to(device))
        sum(p.square().mean() for p in [*predictions.values(), *routing]).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        results.append([x.cpu() for x in (*predictions.values(), *routing, *gradients)])
    assert len(results[0]) > 30
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------------------------------- pretrained weights


def backbone_of(config):
    """The ViT of a random model, as a file of pretrained weights holds it: no LoRA, no experts, no heads."""
    model = randomise(ase.ASE(config)).float()
    return {name: p.data for name, p in model.named_parameters() if name in vit_names(config.depth)}


HUGGING_FACE = {  # timm's names → those of transformers' ViTModel
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "norm.": "layernorm."}
SAVED = HUGGING_FACE | {  # as its save_pretrained writes them
    "blocks.": "encoder.layer.", "attn.qkv": "attention.attention.query|key|value",
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
IN_MEMORY = HUGGING_FACE | {  # as version 5 has them in memory
    "blocks.": "layers.", "attn.qkv": "attention.q_proj|k_proj|v_proj", "attn.proj": "attention.o_proj"}


def transformers_names(state, names, prefix):
    """The weights under other names: query, key and value apart, and the model's pooler."""
    theirs = {f"{prefix}pooler.dense.weight": torch.zeros(2, 2)}
    for name, x in state.items():
        for timm, new in names.items():
            name = name.replace(timm, new)
        before, bar, after = name.partition("|")
        if bar:
            (module, query), (rest, kind) = before.rsplit(".", 1), after.rsplit(".", 1)
            split = zip((query, *rest.split("|")), x.chunk(3))
            theirs |= {f"{prefix}{module}.{which}.{kind}": third for which, third in split}
        else:
            theirs[prefix + name] = x
    return theirs


def under(prefix, state):
    return {prefix + name: x for name, x in state.items()}


def safetensors(state, dtype="F32", header=None, length=None):
    """The bytes of such a file: header length, JSON, numbers; bfloat16 is the upper half of a float32."""
    entries, body = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        x = x.bfloat16().float() if dtype == "BF16" else x
        upper = (x.numpy().view("<u4") >> 16).astype("<u2")
        numbers = {"F32": x.numpy(), "F16": x.half().numpy(), "BF16": upper}
        start, body = len(body), body + numbers[dtype].tobytes()
        entries[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [start, len(body)]}
    text = json.dumps(header or entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


FORMATS = {  # a name → what the file holds, and how exactly
    "bare": (lambda s: s, 1e-5),
    "model": (lambda s: {"model": s, "epoch": 3}, 1e-5),
    "state_dict": (lambda s: {"state_dict": under("module.backbone.", s)}, 1e-5),
    "one inside another": (lambda s: {"state_dict": {"model": under("encoder.", s)}, "epoch": 3}, 1e-5),
    "Lightning": (lambda s: {"state_dict": {"loss.w": torch.ones(2)} | under("model.backbone.", s)}, 1e-5),
    "DINO": (lambda s: {"student": under("module.backbone.", twisted(s)),
                        "teacher": under("backbone.", s) | {"head.mlp.0.weight": torch.ones(2)}}, 1e-5),
    "student before teacher": (lambda s: {"model": under("student.backbone.", twisted(s))
                                          | under("teacher.backbone.", s)}, 1e-5),
    "MoCo v3": (lambda s: {"state_dict": under("module.base_encoder.", s | {"head.0.weight": torch.ones(2)})
                           | under("module.momentum_encoder.", twisted(s))}, 1e-5),
    "MAE": (lambda s: {"model": s | {"mask_token": torch.ones(2), "decoder_pos_embed": torch.ones(2),
                                     "decoder_blocks.0.norm1.weight": torch.ones(2)}}, 1e-5),
    "augreg": (lambda s: s | {"pre_logits.fc.weight": torch.ones(2), "head.weight": torch.ones(2)}, 1e-5),
    "f32": (safetensors, 1e-5),
    "f16": (lambda s: safetensors(s, "F16"), 0.02),
    "bf16": (lambda s: safetensors(s, "BF16"), 0.2),
    "transformers": (lambda s: transformers_names(s, SAVED, "vit."), 1e-5),
    "transformers, f32": (lambda s: safetensors(transformers_names(s, SAVED, "vit.")), 1e-5),
    "transformers in memory": (lambda s: transformers_names(s, IN_MEMORY, ""), 1e-5),
    "transformers in memory, of a classifier": (lambda s: transformers_names(s, IN_MEMORY, "vit."), 1e-5),
}


def twisted(state):
    """Other weights of the same shapes, which must not be taken."""
    return {name: x + 1 for name, x in state.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_one_vit_in_every_format_gives_the_same_features(tmp_path, name):
    content, tolerance = FORMATS[name]
    source, model = randomise(ase.ASE(small(experts=0))).float(), ase.ASE(small()).eval()
    write(tmp_path / "weights", content(backbone_of(small(experts=0))))
    told = ase.load_backbone(model, str(tmp_path / "weights"))
    images = random(3, 3, 8, 8).float()
    expected = source.features(images)[0].expand(2, 3, 5, 18)
    torch.testing.assert_close(model.features(images)[0], expected, rtol=0, atol=tolerance)
    assert "\n" not in told and ("pooler" in told) == ("transformers" in name)


def test_position_embeddings_of_another_grid_are_resized(tmp_path):
    """The class token is kept, a constant stays constant, a ramp along x stays one with its mean."""
    state = backbone_of(small(image=16))
    state["pos_embed"][0, 1:] = 3
    state["pos_embed"][0, 1:, 1] = torch.arange(16.0) % 4
    write(tmp_path / "weights", state)
    for side in (2, 8):
        model = ase.ASE(small(image=4 * side))
        assert f"from 4×4 to {side}×{side}" in ase.load_backbone(model, tmp_path / "weights")
        assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
        grid = model.pos_embed[0, 1:].detach().unflatten(0, (side, side))
        torch.testing.assert_close(grid[..., 2:], torch.full((side, side, 16), 3.0))
        torch.testing.assert_close(grid[..., 1], grid[:1, :, 1].expand(side, side))
        assert grid[0, :, 1].diff().gt(0).all() and grid[..., 1].mean().item() == pytest.approx(1.5, abs=1e-5)


def test_weights_of_another_width_name_the_preset_that_they_fit(tmp_path):
    tiny = ase.Config(**ase.BACKBONES["vit_tiny"])
    write(tmp_path / "weights", backbone_of(tiny))
    assert ase.backbone_for(tmp_path / "weights") == "vit_tiny"
    with pytest.raises(ValueError, match=f"width {tiny.dim}, .*width 18, .*--backbone vit_tiny"):
        ase.load_backbone(ase.ASE(small()), tmp_path / "weights")


def test_weights_are_read_once_and_serve_several_models(tmp_path, monkeypatch):
    read, calls = ase.load, []
    monkeypatch.setattr(ase, "load", lambda path: calls.append(path) or read(path))
    tiny = ase.BACKBONES["vit_tiny"] | dict(head_dim=8)
    write(tmp_path / "weights", backbone_of(ase.Config(**tiny)))
    pretrained = ase.read_backbone(tmp_path / "weights")
    assert ase.backbone_for(pretrained) == "vit_tiny"
    smaller, same = ase.ASE(ase.Config(**tiny | dict(image=80))), ase.ASE(ase.Config(**tiny))
    assert "from 12×12 to 10×10" in ase.load_backbone(smaller, pretrained)
    assert "resized" not in ase.load_backbone(same, pretrained)
    assert torch.equal(same.pos_embed, read(tmp_path / "weights")["pos_embed"]) and len(calls) == 1


def header(**changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return safetensors({}, header={"cls_token": entry | changes}) + bytes(8)


CODE = b"cos\nsystem\n(S'touch executed'\ntR."  # a pickle of os.system("touch executed")
FAULTS = {  # a name → what the file holds, and what the error says of it
    "empty": (lambda s: b"", "expected a file of torch.save"),
    "text": (lambda s: b"are these weights?", "expected a file of torch.save"),
    "one byte": (lambda s: b".", "expected a file of torch.save"),
    "code": (lambda s: CODE, "cannot read"),
    "a tensor": (lambda s: torch.zeros(3), "holds a Tensor"),
    "no ViT": (lambda s: {"fc.weight": torch.zeros(3)}, "fc.weight"),
    "a name of two lines": (lambda s: {"fc\nweight": torch.zeros(3)}, "fc weight"),
    "a key missing": (lambda s: {n: x for n, x in s.items() if n != "norm.bias"}, "lacks norm.bias"),
    "NaN": (lambda s: s | {"norm.bias": s["norm.bias"] / 0}, "norm.bias .*is not finite"),
    "a shape": (lambda s: s | {"norm.bias": torch.zeros(17)}, r"norm.bias .*\(17,\).*\(18,\)"),
    "no square": (lambda s: s | {"pos_embed": torch.zeros(1, 7, 18)}, "7 position embeddings"),
    "no positions": (lambda s: s | {"pos_embed": torch.zeros(1, 1, 18)}, "1 position embeddings"),
    "flat positions": (lambda s: s | {"pos_embed": torch.zeros(18)}, "holds no ViT"),
    "depth": (lambda s: backbone_of(small(depth=3)), "3 blocks.* 2 blocks.*vit_small .width 384"),
    "distilled DeiT": (
        lambda s: s | {"dist_token": torch.zeros(1, 1, 18), "pos_embed": torch.zeros(1, 6, 18)},
        "another architecture: dist_token .*vit_base .width 768, 12 blocks, patch 16"),
    "LayerScale": (lambda s: s | {"blocks.0.ls1.gamma": torch.ones(2)}, "blocks.0.ls1.*vit_tiny"),
    "registers": (lambda s: s | {"reg_token": torch.ones(1, 4, 18)}, "reg_token .*vit_small"),
    "norm_pre": (lambda s: s | {"norm_pre.weight": torch.ones(2)}, "norm_pre"),
    "fc_norm": (lambda s: {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: x
                           for n, x in s.items()}, "another architecture: fc_norm"),
    "norm of keys": (lambda s: s | {"blocks.1.attn.k_norm.weight": torch.ones(6)}, "attn.k_norm.weight"),
    "no keys": (
        lambda s: {n: x for n, x in transformers_names(s, IN_MEMORY, "").items() if "k_proj" not in n},
        "lacks blocks.0.attn.qkv.weight"),
    "patch": (lambda s: backbone_of(small(image=16, patch=8)), "patch 8.* patch 4"),
    "header of 2^60 bytes": (lambda s: safetensors(s, length=2**60), "header"),
    "header cut": (lambda s: safetensors(s, length=9), "cannot read"),
    "offsets outside": (lambda s: header(data_offsets=[2**50, 2**50 + 8]), "cls_token"),
    "offsets below": (lambda s: header(data_offsets=[-8, 0]), "cls_token"),
    "2^60 numbers": (lambda s: header(shape=[2**60]), "cls_token"),
    "an odd shape": (lambda s: header(shape=["2"]), "cannot read"),
    "an odd entry": (lambda s: safetensors({}, header={"cls_token": [1]}), "cannot read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_weights_file_is_one_line_at_once_and_changes_nothing(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    content, told = FAULTS[fault]
    model, untouched = (randomise(ase.ASE(small())) for _ in range(2))
    write(tmp_path / "weights", content(backbone_of(small())))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=told) as error:
        ase.load_backbone(model, tmp_path / "weights")
    assert time.perf_counter() - began < 2 and "\n" not in str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [lambda s: s, safetensors])
def test_a_weights_file_cut_anywhere_or_absent_is_one_line(tmp_path, content):
    path = tmp_path / "weights"
    with pytest.raises(ValueError, match="no weights file"):
        ase.read_backbone(path)
    write(path, content(backbone_of(small())))
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 19):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^[^\n]*expected a file of torch.save[^\n]*$"):
            ase.read_backbone(path)


def test_flags_beside_the_tensors_are_read_and_what_may_run_code_is_refused(tmp_path):
    path, model, state = tmp_path / "it's \"mine\" ✓.pth", ase.ASE(small()), backbone_of(small())
    torch.save({"teacher": under("backbone.", state), "args": argparse.Namespace(lr=0.1)}, path)
    ase.load_backbone(model, path)
    assert torch.equal(model.pos_embed, state["pos_embed"])
    torch.save(state | {"best": np.float64(0.5)}, path)
    with pytest.raises(ValueError, match=r"^[^\n]* holds numpy\S*scalar beside tensors, [^\n]*$"):
        ase.load_backbone(model, path)


def test_a_flipped_bit_is_refused_with_its_part(tmp_path):
    path, state = tmp_path / "weights.pt", {"first": torch.randn(7), "second": torch.arange(5.0)}
    torch.save(state, path)
    whole = path.read_bytes()
    start = whole.index(state["second"].numpy().tobytes())
    for at in range(start, start + 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        with pytest.raises(ValueError, match="weights.pt .its part weights/data/1 is damaged"):
            ase.load(path)


def test_the_command_prints_every_row_of_table_1(capsys):
    """The models are built on torch's meta device, at the paper's size."""
    ase.main([])
    rows = capsys.readouterr().out.splitlines()
    # 5 tasks · 768 · N numbers in each of 12 blocks less
    assert rows[9].endswith(" 106.04 for N = 16, 106.77 for N = 32, 108.25 for N = 64")
    for name, total, row in zip(ase.TABLE1, TABLE1, rows[3:9], strict=True):
        c = ase.TABLE1[name][1]
        assert c.experts == 0 or name.endswith(f"({c.experts}/{c.topk}/{c.shared}/{c.rank})")
        with torch.device("meta"):
            parameters = list(ase.ASE(c).parameters())
        assert row.startswith(name) and total in row.split()
        assert f"{sum(p.numel() for p in parameters) / 1e6:.2f}" == total


def test_an_unknown_flag_is_one_line_and_exit_code_2(fails):
    assert "--unknown" in fails(ase.main, "--unknown")


# -------------------------------------------------------------------------------------------- the edge metric

def slow_thin(image, passes=10**6):
    """Lam, Lee and Suen 1992, pixel by pixel: x1 … x8 from the east, counter-clockwise, x9 = x1."""
    p = np.pad(image, 1).astype(int)
    for _ in range(passes):
        start = p.copy()
        for half in (0, 1):
            gone = []
            for i, j in np.argwhere(p).tolist():
                ring = [(0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1), (0, 1)]
                x = [None] + [p[i + a, j + b] for a, b in ring]
                g1 = sum(not x[2 * k - 1] and (x[2 * k] or x[2 * k + 1]) for k in (1, 2, 3, 4)) == 1
                n1 = sum(x[2 * k - 1] or x[2 * k] for k in (1, 2, 3, 4))
                n2 = sum(x[2 * k] or x[2 * k + 1] for k in (1, 2, 3, 4))
                g2 = 2 <= min(n1, n2) <= 3
                if half == 0:
                    g3 = not ((x[2] or x[3] or not x[8]) and x[1])
                else:
                    g3 = not ((x[6] or x[7] or not x[4]) and x[5])
                if g1 and g2 and g3:
                    gone.append((i, j))
            for i, j in gone:
                p[i, j] = 0
        if (p == start).all():
            break
    return p[1:-1, 1:-1] > 0


def blobs(rng, h, w, ids=9, size=7):
    """A label map of smooth regions: the largest of several blurred noises."""
    fields = rng.standard_normal((ids, h, w))
    return np.stack([ndimage.gaussian_filter(field, size) for field in fields]).argmax(axis=0)


def edges_of(labels):
    return boundaries(torch.from_numpy(labels)[None])[0].numpy()


def shapes(h=41, w=37):
    y, x = np.mgrid[:h, :w]
    disc = (y - 20) ** 2 + (x - 17) ** 2 < 150
    ring = disc & ((y - 20) ** 2 + (x - 17) ** 2 > 60)
    full = np.ones((h, w), dtype=bool)
    return [disc, ring, full, ~full, abs(y - x) < 3, (y % 7 < 2) | (x % 11 < 2)]


def maps(rng, h=29, w=31):
    """Random maps of all densities, dots and blobs, tiny ones, with (41, 37) shapes among them."""
    out = [rng.random((h, w)) < density for density in (0.1, 0.3, 0.5, 0.7, 0.9)]
    out += [ndimage.gaussian_filter(rng.standard_normal((h, w)), size) > 0 for size in (1, 2, 3)]
    out += [rng.random(shape) < 0.7 for shape in 5 * [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5)]]
    return out + shapes()


def test_thin_is_lam_lee_suen():
    for image in maps(np.random.default_rng(0)):
        assert (thin(image) == slow_thin(image)).all()
        for passes in (1, 2, 3):
            assert (thin(image, passes) == slow_thin(image, passes)).all()


def test_thin_all_3x3_neighbourhoods():
    """Each of the 512 patterns at once, as 8 words of 64 bits: the bitwise algebra has no case left out."""
    patterns = (np.arange(512)[:, None] >> np.arange(9) & 1).astype(bool).reshape(512, 3, 3)
    padded = np.pad(patterns, ((0, 0), (1, 1), (1, 1)))
    words = np.packbits(padded, axis=0, bitorder="little").reshape(8, 8, 5, 5)
    words = np.ascontiguousarray(np.moveaxis(words, 1, -1)).view("<u8")[..., 0]
    for once in thin(words), thin_words(words):
        for k, pattern in enumerate(padded):
            assert ((once[k // 64] >> np.uint64(k % 64) & np.uint64(1)) == slow_thin(pattern)).all()


def test_thin_words_torch_and_numpy_agree():
    rng = np.random.default_rng(2)
    stack = rng.random((64, 23, 29)) < np.linspace(0.05, 0.95, 64)[:, None, None]
    stack[7] = ndimage.gaussian_filter(rng.standard_normal((23, 29)), 3) > 0
    words = sum(image.astype(np.uint64) << np.uint64(k) for k, image in enumerate(stack))
    original = words.copy()
    singly = [thin(image) for image in stack]
    for once in thin(words), thin_words(words[None])[0]:
        assert once.dtype == np.uint64
        for k in range(64):
            assert ((once >> np.uint64(k) & np.uint64(1)) == singly[k]).all()
    assert (words == original).all()  # the input is left alone
    assert (thin(torch.from_numpy(stack)).numpy() == np.stack(singly)).all()
    for passes in (1, 2):
        assert (thin(torch.from_numpy(stack), passes).numpy() == thin(stack, passes)).all()


def test_two_passes_are_enough_for_smooth_boundaries():
    rng = np.random.default_rng(3)
    for _ in range(5):
        edge = edges_of(blobs(rng, 113, 97))
        done = thin(edge)
        assert 0 < done.sum() < edge.sum()
        assert (thin(edge, 2) != done).sum() <= 0.01 * done.sum()  # junctions
    y, x = np.mgrid[:101, :103]
    edge = edges_of((y - 50) ** 2 + (x - 50) ** 2 < 1600)
    assert (thin(edge, 2) == thin(edge)).all()


@pytest.mark.parametrize("shape", [(2, 3), (5, 2), (31, 37)])
def test_boundaries_is_scipys_laplacian(shape):
    rng = np.random.default_rng(4)
    for high in (2, 4, 460):
        labels = rng.integers(0, high, (3, *shape))
        expected = [ndimage.laplace(x, mode="mirror") != 0 for x in labels]
        assert (boundaries(torch.from_numpy(labels.astype(np.int16))).numpy() == expected).all()


def test_boundaries_laplacian_can_cancel():
    """1 2 3: the middle pixel differs from both neighbours, and is no boundary."""
    assert boundaries(torch.tensor([[[1, 2, 3]] * 2])).tolist() == [[[True, False, True]] * 2]


def slow_seg2bmap(labels):
    """The pixels whose label is not that of the east, south or south-east neighbour, where there is one."""
    h, w = labels.shape
    found = np.zeros((h, w), bool)
    for y, x in itertools.product(range(h), range(w)):
        for j, i in (y, x + 1), (y + 1, x), (y + 1, x + 1):
            if y == h - 1:  # the last row: only east
                found[y, x] |= i < w and labels[y, i] != labels[y, x]
            elif x == w - 1:  # the last column: only south
                found[y, x] |= labels[y + 1, x] != labels[y, x]
            else:
                found[y, x] |= labels[j, i] != labels[y, x]
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3), (13, 11)])
def test_seg2bmap_is_its_definition(shape):
    rng = np.random.default_rng(13)
    for high in (2, 3, 460):
        for labels in rng.integers(0, high, (5, *shape)):
            assert (evaluate.seg2bmap(labels) == slow_seg2bmap(labels)).all()
            assert not evaluate.seg2bmap(labels)[-1, -1]  # the corner never


def test_the_truths_of_training_and_of_evaluation_in_one_picture():
    """labels           judged (odsF)    trained on

       0 0 1 2 2 2      . . . . . .      . # . # . .     The strip of ones: seg2bmap draws it two pixels wide,
       0 0 1 2 2 2      . # . . . .      . # . # . .     which thinning makes one line; the Laplacian leaves
       0 0 1 2 2 2      . . # # # #      . # . . # .     its middle out, since 1 lies between 0 and 2, and
       0 0 1 3 3 3      . # . . . .      . # . # . .     keeps both sides.
       0 0 1 3 3 3      . # . . . .      . . # . . .
       0 0 1 3 3 3      . # . . . .      . . . . . .
    """
    labels = np.repeat([[0, 0, 1, 2, 2, 2], [0, 0, 1, 3, 3, 3]], 3, 0)
    columns = [line.split() for line in (
        test_the_truths_of_training_and_of_evaluation_in_one_picture.__doc__.splitlines()[2:8])]
    for truth, first in ((thin(evaluate.seg2bmap(labels)), 6), (thin(edges_of(labels)), 12)):
        assert ["".join(".#"[int(pixel)] for pixel in row) for row in truth] == [
            "".join(line[first:first + 6]) for line in columns]


def slow_suppress(prob):
    """metrics: the structured-edges toolbox, pixel by pixel, in float64."""
    h, w = prob.shape

    def at(a, i, j):  # symmetric padding
        i = i if 0 <= i < h else (-1 - i if i < 0 else 2 * h - 1 - i)
        j = j if 0 <= j < w else (-1 - j if j < 0 else 2 * w - 1 - j)
        return a[i, j]

    def gradient(a):  # (along x, along y)
        gx, gy = np.zeros((h, w)), np.zeros((h, w))
        for i in range(h):
            for j in range(w):
                left, right, up, down = max(j - 1, 0), min(j + 1, w - 1), max(i - 1, 0), min(i + 1, h - 1)
                gx[i, j] = (a[i, right] - a[i, left]) / (right - left)
                gy[i, j] = (a[down, j] - a[up, j]) / (down - up)
        return gx, gy

    smooth = np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            for a in range(-4, 5):
                for b in range(-4, 5):
                    smooth[i, j] += (5 - abs(a)) * (5 - abs(b)) / 625 * at(prob, i + a, j + b)
    ox, oy = gradient(smooth)
    oxx, _ = gradient(ox)
    oxy, oyy = gradient(oy)
    out = prob.copy()
    for i in range(h):
        for j in range(w):
            angle = np.arctan(oyy[i, j] * np.sign(-oxy[i, j]) / (oxx[i, j] + 1e-5)) % np.pi
            for side in (-1, 1):
                x = min(max(j + side * np.cos(angle), 0), w - 1)
                y = min(max(i + side * np.sin(angle), 0), h - 1)
                x0, y0 = min(int(x), w - 2), min(int(y), h - 2)
                fx, fy = x - x0, y - y0
                top = prob[y0, x0] * (1 - fx) + prob[y0, x0 + 1] * fx
                bottom = prob[y0 + 1, x0] * (1 - fx) + prob[y0 + 1, x0 + 1] * fx
                if 1.01 * prob[i, j] < top * (1 - fy) + bottom * fy:
                    out[i, j] = 0
            out[i, j] *= min(j, w - 1 - j, 5) / 5 * min(i, h - 1 - i, 5) / 5
    return out


@pytest.mark.parametrize("shape", [(23, 31), (31, 17), (11, 13)])
def test_suppress_is_the_pixel_loop(shape):
    rng = np.random.default_rng(5)
    for size in (0, 1, 2.5):
        prob = ndimage.gaussian_filter(rng.random(shape), size)
        prob = (prob - prob.min()) / np.ptp(prob)
        before = prob.copy()
        assert np.allclose(suppress(prob), slow_suppress(prob), rtol=0, atol=1e-12)
        assert (prob == before).all()
        single = suppress(prob.astype(np.float32))
        assert single.dtype == np.float32
        assert (abs(single - suppress(prob)) > 1e-5).mean() < 0.02  # ties of rounding only


def pairs(predicted, gt, reach):
    """(predicted, truth) bool: which pairs may match."""
    a, b = np.argwhere(predicted), np.argwhere(gt)
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1)) <= reach


def test_matching_exhaustively():
    """Every way to give the truth pixels to the predicted ones, on tiny grids."""
    rng = np.random.default_rng(6)
    seen = set()
    for _ in range(300):
        h, w = rng.integers(2, 5, 2)
        gt = rng.random((h, w)) < 0.35
        prob = (rng.random((h, w)) < 0.45).astype(float)
        reach = rng.choice([1, 1.5, 2.3])
        predicted = slow_thin(prob > 0.5)
        allowed = pairs(predicted, gt, reach)
        if allowed.shape[0] > allowed.shape[1]:
            allowed = allowed.T
        if allowed.shape[1] > 7:
            continue
        ways = itertools.permutations(range(allowed.shape[1]), allowed.shape[0])
        best = max(sum(allowed[i, j] for i, j in enumerate(way)) for way in ways)
        found = edge_counts(prob, gt, [0.5], max_dist=reach / np.hypot(h, w) * (1 + 1e-9), nms=False)
        assert found.tolist() == [[best, predicted.sum(), gt.sum()]]
        seen.add(int(best))
    assert len(seen) >= 4  # the maps were not all trivial


def cases(rng, count):
    """Maps and thin truths of ragged sizes: noise, blurred noise, boundaries moved and blurred."""
    for k in range(count):
        h, w = rng.integers(11, 30, 2)
        labels = blobs(rng, h, w, 5, 3)
        gt = thin(edges_of(labels))
        if k % 3 == 0:
            prob = rng.random((h, w))
        elif k % 3 == 1:
            prob = ndimage.gaussian_filter(rng.random((h, w)), 1)
            prob = (prob - prob.min()) / np.ptp(prob)
        else:
            moved = np.roll(edges_of(labels), rng.integers(-2, 3, 2), (0, 1)).astype(float)
            prob = np.clip(ndimage.gaussian_filter(moved, 1) + 0.3 * rng.random((h, w)), 0, 1)
        if k % 7 == 0:
            gt = thin(rng.random((h, w)) < 0.5)
        yield prob.astype(np.float32 if k % 2 else np.float64), gt


def flow_counts(prob, gt, thresholds, max_dist=0.0075, nms=True):
    """`edge_counts` the plain way: each threshold is thinned and matched anew, by scipy's flow."""
    prob = suppress(prob) if nms else prob
    tree, m, counts = cKDTree(np.argwhere(gt).reshape(-1, 2)), int(gt.sum()), []
    for t in map(float, thresholds):  # a plain number compares in the type of prob
        predicted = np.argwhere(thin(prob > t)).reshape(-1, 2)
        n = len(predicted)
        near = cKDTree(predicted).query_ball_tree(tree, max_dist * np.hypot(*gt.shape)) if n else []
        p = np.repeat(np.arange(n), [len(truths) for truths in near])
        rows = np.r_[np.zeros(n, int), p + 1, n + 1 + np.arange(m)]
        columns = np.r_[1 + np.arange(n), np.array(list(itertools.chain(*near)), int) + n + 1,
                        np.full(m, n + m + 1)]
        graph = csr_array((np.ones(len(rows), np.int32), (rows, columns)), shape=(n + m + 2, n + m + 2))
        counts.append((maximum_flow(graph, 0, n + m + 1, method="dinic").flow_value, n, m))
    return np.array(counts)


def test_counts_are_those_of_one_threshold_after_another():
    thresholds = np.array([0.05, 0.2, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 0.9])
    for k, (prob, gt) in enumerate(cases(np.random.default_rng(7), 105)):
        reach, nms = (0.06, 0.1, 0.16)[k % 5 % 3], bool(k // 3 % 2)
        expected = flow_counts(prob, gt, thresholds, reach, nms)
        assert (edge_counts(prob, gt, thresholds, reach, nms) == expected).all()


@pytest.mark.parametrize("nms", [True, False])
def test_a_500_pixel_image_counts_as_the_plain_way_and_faster(nms):
    """`pytest test_ase.py -k plain_way -s` prints the times."""
    scene = data.scene(3, 375, 500)
    edges = boundaries(torch.from_numpy(scene["labelmap"].astype(np.int32))[None])[0].numpy()
    noise = np.random.default_rng(0).random((2, 375, 500))
    noise = [ndimage.gaussian_filter(x, 4) * 20 - 9.5 for x in noise]  # about 0.5 ± 0.3
    prob = (2 * ndimage.gaussian_filter(edges.astype(float), 1.5) * noise[0] + 0.3 * noise[1]).clip(0, 1)
    start = time.perf_counter()
    ours = edge_counts(prob, thin(edges), THRESHOLDS, nms=nms)
    middle = time.perf_counter()
    plain = flow_counts(prob, thin(edges), THRESHOLDS, nms=nms)
    end = time.perf_counter()
    assert (ours == plain).all() and ours[:, 0].max() > 1000
    print(f"\n101 thresholds, 500×375, {'with' if nms else 'without'} NMS: {middle - start:.2f} s, "
          f"one threshold after another {end - middle:.1f} s, {(end - middle) / (middle - start):.0f} times")
    assert end - middle > 2 * (middle - start)


def test_long_paths_on_a_dense_map():
    """As many predicted as truth pixels: paths grow long, and the matching needs several rounds."""
    rng = np.random.default_rng(9)
    prob, gt = rng.random((113, 109)), thin(rng.random((113, 109)) < 0.5)
    expected = flow_counts(prob, gt, [0.5], 0.015, nms=False)
    assert (edge_counts(prob, gt, [0.5], 0.015, nms=False) == expected).all()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 99, 101, 130])
def test_any_number_of_thresholds_in_any_order(count):
    rng = np.random.default_rng(10)
    prob, gt = next(cases(rng, 1))
    thresholds = np.linspace(0, 1, count)
    prob.flat[:count:3] = thresholds[: prob.size : 3]  # exactly at a threshold is not above it
    words = threshold_bits(prob, thresholds)
    for k, t in enumerate(thresholds):
        assert ((words[k // 64] >> np.uint64(k % 64) & np.uint64(1)) == (prob > t)).all()
    counts = edge_counts(prob, gt, thresholds, 0.08)
    assert counts.shape == (count, 3) and counts.dtype == np.int64
    shuffled = rng.permutation(count)
    assert (edge_counts(prob, gt, thresholds[shuffled], 0.08) == counts[shuffled]).all()
    some = slice(None, None, 9)
    assert (flow_counts(prob, gt, thresholds[some], 0.08) == counts[some]).all()


def test_thresholds():
    assert len(THRESHOLDS) == 101 and THRESHOLDS[0] == 0.001 and THRESHOLDS[-1] == 0.999
    assert np.allclose(THRESHOLDS[1:-1], np.linspace(0.01, 0.99, 99))


def points(shape, *at):
    out = np.zeros(shape, dtype=bool)
    for i, j in at:
        out[i, j] = True
    return out


def test_exactly_at_the_reach():
    """240×320 has a diagonal of 400, so a reach of 3 pixels; 30×40 with 0.1: 5 pixels, as 3-4-5."""
    gt = points((240, 320), (100, 100))
    for at, matched in (((100, 103), 1), ((100, 104), 0), ((102, 102), 1), ((103, 101), 0), ((97, 100), 1)):
        prob = points((240, 320), at).astype(float)
        assert edge_counts(prob, gt, [0.5], nms=False).tolist() == [[matched, 1, 1]]
    for at, matched in (((13, 24), 1), ((14, 24), 0)):
        prob = points((30, 40), at).astype(float)
        assert edge_counts(prob, points((30, 40), (10, 20)), [0.5], 0.1, False).tolist() == [[matched, 1, 1]]


def test_exactly_at_a_threshold_is_not_above_it():
    prob = 0.2 * points((23, 29), (10, 10))
    for kind in (np.float32, np.float64):
        counts = edge_counts(prob.astype(kind), points((23, 29), (10, 10)), THRESHOLDS[19:22], nms=False)
        assert counts.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]


def test_nothing_predicted_and_no_truth():
    gt = points((23, 29), (10, 10), (3, 4))
    none = np.zeros((23, 29))
    for nms in (True, False):
        assert edge_counts(none, gt, [0.3, 0.6], nms=nms).tolist() == [[0, 0, 2], [0, 0, 2]]
        empty = edge_counts(np.random.default_rng(11).random((23, 29)), gt & False, [0.3, 0.6], nms=nms)
        assert (empty[:, 1] > 0).all() and not empty[:, [0, 2]].any()
    assert ods_f([[0, 0, 2], [0, 0, 2]]) == 0
    assert np.isnan(ods_f(empty))
    assert np.isnan(ods_f([[0, 0, 0]]))


def test_ods_f_by_hand():
    """P = 6/8, R = 6/12: F = 0.6. P = 9/24, R = 9/12: F = 0.5. No mean over images, no interpolation."""
    assert ods_f([[6, 8, 12], [9, 24, 12], [0, 0, 12]]) == pytest.approx(60)
    one, two = np.array([[1, 1, 1]]), np.array([[0, 8, 4]])
    assert ods_f(one + two) == pytest.approx(100 * 2 * (1 / 9) * (1 / 5) / (1 / 9 + 1 / 5))


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="NaN"):
        edge_counts(np.full((11, 13), np.nan), np.zeros((11, 13), bool), [0.5])
    with pytest.raises(ValueError, match="float"):
        edge_counts(np.zeros((11, 13), bool), np.zeros((11, 13), bool), [0.5])
    with pytest.raises(ValueError, match="both the same"):
        edge_counts(np.zeros((13, 11)), np.zeros((11, 13), bool), [0.5])


BSDS500 = os.environ.get("BSDS500_BENCH_DATA", "")


@pytest.mark.skipif(not BSDS500, reason="BSDS500_BENCH_DATA names no folder: BSDS500's bench/data")
def test_recall_and_thinned_pixels_are_matlabs_on_bsds500():
    """On the images that BSDS500 ships with its benchmark. Recall is summed over an image's annotators, and
    comparable; precision counts a pixel that any of them confirms, which no one-to-one match tells. But times
    the number of thinned pixels it is a whole number, if Matlab found as many."""
    root = Path(BSDS500)
    given, recall, precision, _ = np.loadtxt(root / "test_2/eval_bdry_thr.txt").T
    step = 1 / (len(given) + 1)
    thresholds = np.linspace(step, 1 - step, len(given))  # in the file they have six digits
    assert np.allclose(given, thresholds, atol=1e-6)
    thresholds = np.nextafter(thresholds, 0)  # the benchmark's >= is > for the number just below
    matched = truth = predicted = 0
    pictures = sorted((root / "png").glob("*.png"))
    for path in pictures:
        with Image.open(path) as image:
            prob = np.asarray(image.convert("L")) / 255
        annotators = scipy.io.loadmat(root / f"groundTruth/{path.stem}.mat")["groundTruth"].ravel()
        for annotator in annotators:
            counts = edge_counts(prob, annotator["Boundaries"][0, 0] > 0, thresholds, nms=False)
            matched, truth = matched + counts[:, 0], truth + counts[:, 2]
        predicted = predicted + counts[:, 1]
    assert pictures and (matched / truth >= recall - 1e-6).all() and (matched / truth <= 1.002 * recall).all()
    confirmed = precision * predicted
    assert (abs(confirmed - confirmed.round()) <= 1e-6 * predicted).all()


# ----------------------------------------------------------------------------------------------- the pictures

def five_maps(height=20, width=30):
    normals = rng.normal(size=(3, height, width))
    normals /= np.linalg.norm(normals, axis=0)
    classes = {task: rng.integers(0, high, (height, width))
               for task, high in (("semseg", 21), ("human_parts", 7), ("edge", 2))}
    return classes | {"sal": rng.random((height, width)), "normals": normals}


def drawn(path):
    """A picture that opens, is not one colour, and is less than 1 MB."""
    with Image.open(path) as opened:
        image = np.asarray(opened)
    return image.std() > 1 and path.stat().st_size < 1e6


def test_palette_is_vocs():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0),
             12: (64, 0, 128), 15: (192, 128, 128), 16: (0, 64, 0), 20: (0, 64, 128)}
    assert all(tuple(PALETTE[i]) == colour for i, colour in known.items())
    assert len({tuple(colour) for colour in PALETTE}) == 256


def test_paint_void_is_the_same_grey_in_every_task():
    void = tuple(PALETTE[255])
    assert tuple(paint(TASKS["semseg"], np.array([[255]]))[0, 0]) == void
    assert tuple(paint(TASKS["edge"], np.array([[255, 1]], np.uint8))[0, 0]) == void
    assert tuple(paint(TASKS["normals"], np.zeros((3, 1, 1)))[0, 0]) == void


def test_paint_values():
    assert paint(TASKS["sal"], np.array([[0, 1], [0.2, 255]])).tolist() == [
        [[255] * 3, [0] * 3], [[204] * 3, [224] * 3]]
    assert paint(TASKS["edge"], np.array([[0, 1]], np.uint8)).tolist() == [[[255] * 3, [0] * 3]]
    assert paint(TASKS["edge"], np.array([[False, True]])).tolist() == [[[255] * 3, [0] * 3]]
    assert paint(TASKS["sal"], np.full((2, 3), 255)).tolist() == [[[224] * 3] * 3] * 2
    assert paint(TASKS["normals"], np.array([0, -1, 1.0]).reshape(3, 1, 1)).tolist() == [[[128, 0, 255]]]
    depth = Task(1, 1, "l1", "rmse", True, "depth")
    assert paint(depth, np.array([[0, 10.0]])).tolist() == [[[255] * 3, [0] * 3]]


def test_legend_lists_exactly_the_classes_that_occur():
    arrays = [np.array([[0, 15]]), np.array([[255, 7, 7]])]
    names = [name for name, _ in legend_of(TASKS["semseg"], arrays)]
    assert names == ["background", "car", "person", "ignored"]
    assert dict(legend_of(TASKS["semseg"], arrays))["person"] == (192, 128, 128)
    assert dict(legend_of(TASKS["normals"], []))["ignored"] == (224, 224, 224)


def test_sheet_shows_every_cell_and_keeps_the_aspect():
    colours = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    cells = [np.broadcast_to(c, shape + (3,)) for c, shape in zip(colours, [(10, 40), (300, 100), (7, 7)])]
    picture = np.asarray(sheet([cells[:2], cells[2:]], legend=[("x", None), ("name", (1, 2, 3))],
                               labels=["a", "b"]))
    counts = [(picture == c).all(-1).sum() for c in colours]
    assert counts == [180 * 45, 60 * 180, 180 * 180]
    assert (picture == (1, 2, 3)).all(-1).any()


def test_predictions(tmp_path):
    image = rng.integers(0, 255, (20, 30, 3), np.uint8)
    draw_predictions(tmp_path / "p.png", [(image, five_maps(), five_maps())] * 2)
    draw_predictions(tmp_path / "photo.png", [(image, None, five_maps())])
    assert drawn(tmp_path / "p.png") and drawn(tmp_path / "photo.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width == 6 + 11 * 186


def test_a_new_task_is_a_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "depth", Task(1, 1, "l1", "rmse", True, "depth"))
    sample = {"depth": 10 * rng.random((9, 9))}
    draw_predictions(tmp_path / "p.png", [(np.zeros((9, 9, 3), np.uint8), sample, sample)])
    assert drawn(tmp_path / "p.png")


@pytest.mark.parametrize("layers, experts, shared", [(6, 32, 2), (12, 64, 4), (1, 1, 0), (2, 300, 1)])
def test_experts(tmp_path, layers, experts, shared):
    epochs = [(e, rng.random((layers, 5, experts)).tolist()) for e in (1, 2, 3, 4)]
    draw_experts(tmp_path / "e.png", epochs, list(TASKS), shared)
    assert drawn(tmp_path / "e.png")


def test_without_experts_steps_or_truth_nothing_is_drawn(tmp_path):
    draw_experts(tmp_path / "e.png", [(1, np.zeros((6, 5, 0)).tolist())], list(TASKS), 0)
    draw_experts(tmp_path / "e.png", [], list(TASKS), 0)
    draw_curves(tmp_path / "c.png", [])
    draw_edges(tmp_path / "d.png", np.zeros((9, 3), int), np.linspace(0, 1, 9))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 300])
def test_curves(tmp_path, count):
    records = [{"kind": "step", "step": s, "epoch": s / 50, "losses": {"sal": 1 / s, "edge": 0.0},
                "lr": 1e-4 * s} for s in range(1, count + 1)]
    records += [{"kind": "epoch", "epoch": 1, "step": count, "val": {"sal": float("nan"), "edge": 0.1}}]
    draw_curves(tmp_path / "c.png", records)
    draw_curves(tmp_path / "d.png", records[:1])
    assert drawn(tmp_path / "c.png") and drawn(tmp_path / "d.png")


def test_the_shared_experts_share_is_drawn_with_the_line_of_equal_logits(tmp_path, monkeypatch):
    gates = rng.random((3, 2, 2, 5))  # epochs, layers, tasks, experts
    gates /= gates.sum(-1, keepdims=True)
    records = [{"kind": "step", "step": 7, "epoch": 1, "losses": {"sal": 1.0, "edge": 0.5}, "lr": 1e-4}]
    records += [{"kind": "epoch", "step": 7 * e, "epoch": e, "val": {"sal": 1.0, "edge": 1.0},
                 "gates": gates[e - 1].tolist()} for e in (1, 2, 3)]
    panels, plot = {}, evaluate.plot
    monkeypatch.setattr(evaluate, "plot", lambda *args, **axes: [
        panels.update({axes["labels"][0]: axes["series"]}), plot(*args, **axes)][1])
    draw_curves(tmp_path / "c.png", records, shared=2, topk=3)
    (_, neutral, *_), *shares = panels["gates of the shared experts"]
    assert neutral == (2 / 5, 2 / 5) and drawn(tmp_path / "c.png")
    for t, (steps, share, *_) in enumerate(shares):
        expected = [(gates[e, 0, t, 0] + gates[e, 0, t, 1] + gates[e, 1, t, 0] + gates[e, 1, t, 1]) / 2
                    for e in range(3)]
        assert steps == [7, 14, 21] and share == pytest.approx(expected)
    panels.clear()
    draw_curves(tmp_path / "c.png", records)
    assert "gates of the shared experts" not in panels and "learning rate" in panels


@pytest.mark.parametrize("hole", [math.nan, math.inf, None])
def test_what_is_not_finite_in_a_log_leaves_a_gap_in_the_pictures(tmp_path, hole):
    records = [{"kind": "step", "step": s, "epoch": 1, "losses": {"sal": hole, "edge": (1.0, hole)[s % 2]},
                "lr": hole} for s in (1, 2, 3)]
    records += [{"kind": "epoch", "step": 3, "epoch": 1, "val": {"sal": hole, "edge": hole},
                 "gates": [[[hole, 0.5], [0.2, hole]]]}]
    draw_curves(tmp_path / "c.png", records, shared=1, topk=1)
    draw_experts(tmp_path / "e.png", [(1, records[-1]["gates"])], ["sal", "edge"], 1)
    assert drawn(tmp_path / "c.png") and drawn(tmp_path / "e.png")


def test_edges(tmp_path):
    draw_edges(tmp_path / "d.png", [(80, 200, 100), (50, 60, 100), (0, 0, 100)], [0.1, 0.5, 0.9])
    draw_edges(tmp_path / "n.png", [(0, 0, 100)], [0.5])
    assert drawn(tmp_path / "d.png") and drawn(tmp_path / "n.png")


def test_ticks_are_round_and_inside():
    for low, high in [(0, 1800), (0.03, 0.13), (0, 5e-4), (0, 25000), (1.7, 1.7), (-2, 3)]:
        ticks = evaluate.round_ticks(low, high)
        assert len(ticks) <= 7 and (ticks >= low - 1e-9).all() and (ticks <= high + 1e-9).all()
        steps = np.diff(ticks)
        assert low == high or len(ticks) >= 3 and f"{steps[0]:e}"[:8] in ("1.000000", "2.000000", "5.000000")


# --------------------------------------------------------------------------------------------------- the data


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A small demo that every test reads and none writes: 13 and 7 images of at most 48 pixels."""
    root = tmp_path_factory.mktemp("data") / "mini"
    data.make_demo(root, 13, 7, 48)
    return root


@pytest.fixture
def broken(mini, tmp_path):
    """A copy of the small demo to break. Its first image, 2008_000001, is 48×36."""
    return shutil.copytree(mini, tmp_path / "broken")


def tree(root):
    """When each file below a folder was written, and which one it is."""
    stats = {path: path.stat() for path in sorted(root.rglob("*")) if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


# Data on disk.


def struct(rows, fields):
    """A struct array of Matlab's; the fields' names, a letter each, are not to be relied on."""
    return np.array([rows], [(field, object) for field in fields])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_loader_reads_what_was_written_by_hand(tmp_path, mode):
    """One image of 7×5, an odd size, whose every map is written out here."""
    voc, labels, head, torso = np.zeros((4, 5, 7), np.uint16)
    voc[2, 3], voc[0, 0] = 15, 255
    labels[:], labels[:, 4:] = 284, 360
    head[1, 1:3], torso[1:3, 1] = 1, 1
    parts = struct([("head", head), ("torso", torso)], "ab")
    objects = struct([("person", 15, head | torso, parts), ("cow", 10, head, np.empty((0, 0)))], "pqrs")
    palettised = Image.fromarray(voc.astype(np.uint8))
    palettised.putpalette(PALETTE.ravel().tolist())
    files = {"JPEGImages/1.jpg": Image.new("RGB", (7, 5), (90, 90, 90)).convert(mode),
             "semseg/VOC12/1.png": palettised, "semseg/pascal-context/1.png": Image.new("L", (7, 5), 1),
             "sal_distill/1.png": Image.fromarray(np.uint8(100 + 100 * (voc == 15))),
             "normals_distill/1.png": Image.new("RGB", (7, 5), (0, 128, 255)),
             "human_parts/1.mat": {"anno": struct([("1", objects)], "xy")},
             "pascal-context/trainval/1.mat": {"LabelMap": labels}}
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        scipy.io.savemat(path, content) if path.suffix == ".mat" else content.save(path)
    (tmp_path / "ImageSets/Context").mkdir(parents=True)
    (tmp_path / "ImageSets/Context/train.txt").write_text("1 \r\n")  # trailing blanks and CRLF are legal

    image, truth = data.PascalContext(tmp_path, "train", 32)[0]
    assert image.shape == (3, 5, 7) and abs(image.float() - 90).max() <= 2
    assert (truth["semseg"].numpy() == voc).all()  # VOC12 goes before pascal-context
    expected = np.zeros((5, 7), int)
    expected[1, 2], expected[1:3, 1] = 1, 2  # painted in the order of the file
    assert (truth["human_parts"].numpy() == expected).all()
    assert (truth["sal"].numpy() == (voc == 15)).all()
    laplacian = ndimage.laplace(labels.astype(int), mode="mirror") != 0
    assert (truth["edge"].numpy() == slow_thin(laplacian)).all()
    n = np.array([-1, 2 * 128 / 255 - 1, 1])
    expected = (n / np.linalg.norm(n))[:, None, None] * (labels == 284)  # sky has no normals
    np.testing.assert_allclose(truth["normals"].numpy(), expected, atol=1e-6)


def test_anno_with_one_object_none_or_without_parts_is_legal(tmp_path):
    def part_map(objects):
        scipy.io.savemat(tmp_path / "anno.mat", {"anno": struct([("name", objects)], "xy")})
        return data.decode_parts(tmp_path / "anno.mat", (7, 5))

    mask, nothing = np.eye(5, 7, dtype=np.uint8), np.empty((0, 0))
    one = struct([("person", 15, mask, struct([("lfoot", mask)], "ab"))], "pqrs")
    assert (part_map(one) == 6 * mask).all()
    bare = struct([("person", 15, mask, nothing), ("cow", 10, mask, nothing)], "pqrs")
    for objects in (bare, bare[:, :0], nothing):
        assert (part_map(objects) == np.zeros((1, 5, 7))).all()


CLASSES_WITH_NORMALS = """
    3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69
    72 73 78 83 84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146 150 154 157 158
    159 165 172 174 181 183 184 191 193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239
    242 243 246 250 251 252 255 260 261 263 269 272 273 275 281 283 284 285 286 287 288 290 291 292 293 295
    304 307 309 310 314 315 319 323 329 330 331 336 342 345 349 350 351 352 355 357 368 370 371 374 379 380
    383 384 397 401 403 405 407 408 411 412 413 414 417 419 421 423 427 429 430 432 440 441 442 443 444 446
    454 457"""


def test_the_tables_are_the_fields():
    """An independent copy of the 24 part names, the 170 classes with normals, weights and channels."""
    parts = {"head": "hair head lear lebrow leye mouth nose rear rebrow reye", "torso": "neck torso",
             "upper arm": "luarm ruarm", "lower arm": "lhand llarm rhand rlarm", "upper leg": "luleg ruleg",
             "lower leg": "lfoot llleg rfoot rlleg"}
    found = {name: " ".join(sorted(part for part, index in data.PART_OF.items()
                                   if data.PART_CLASSES[index] == name)) for name in data.PART_CLASSES[1:]}
    assert found == parts and len(data.PART_OF) == 24 and data.PART_CLASSES[0] == "background"
    assert list(data.VALID_NORMALS) == [int(number) for number in CLASSES_WITH_NORMALS.split()]
    rows = {"semseg": (21, 1, False), "human_parts": (7, 2, False), "sal": (1, 5, False),
            "edge": (1, 50, False), "normals": (3, 10, True)}
    assert rows == {name: (task.channels, task.weight, task.lower_is_better) for name, task in TASKS.items()}
    assert data.VOC_CLASSES[1:] == tuple(
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
        "pottedplant sheep sofa train tvmonitor".split())
    x = torch.tensor([0.0, 255]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    black, white = data.normalise(x, "imagenet")[0, :, 0].unbind(-1)
    np.testing.assert_allclose(black, [-2.1179, -2.0357, -1.8044], atol=1e-4)
    np.testing.assert_allclose(white, [2.2489, 2.4286, 2.64], atol=1e-4)
    assert data.normalise(x, "half").flatten().tolist() == [-1, 1] * 3


@pytest.mark.parametrize("name", ["sal", "image", "normals"])
def test_sixteen_bits_are_scaled_and_floats_refused(broken, name):
    path, size = data.find(broken, name, "2008_000001"), None if name == "image" else (48, 36)
    values = np.full((36, 48), 20_000, np.uint16)
    values[:, 24:] = 50_000
    Image.fromarray(values).save(path, "PNG")
    planes = data.read_map(broken, name, "2008_000001", size)
    low, high = (0, 1) if name == "sal" else (77, 194)
    assert (planes[:, :, :23] == low).all() and (planes[:, :, 25:] == high).all()
    Image.fromarray(np.full((36, 48), 0.5, np.float32)).save(path, "TIFF")
    with pytest.raises(data.Fault, match=f"{path} holds float32 numbers"):
        data.read_map(broken, name, "2008_000001", size)


# Batches.


def a_scene(labels=None):
    """Random planes of all maps, (11, 48, 48): image, normals, saliency, semseg, parts, LabelMap."""
    generator = np.random.default_rng(3)
    planes = np.zeros((11, 48, 48), np.uint8)
    planes[:6] = generator.integers(0, 256, (6, 48, 48))
    planes[7] = generator.integers(0, 21, (48, 48))
    planes[8, 10:20, 10:20] = 3
    if labels is None:
        labels = np.kron(generator.choice([284, 59, 360], (6, 6)), np.ones((8, 8), int))
    planes[9], planes[10] = labels & 255, labels >> 8
    return torch.from_numpy(planes)


def warped(planes, matrix=((1, 0), (0, 1))):
    """The images and targets of a batch of one."""
    matrix = torch.tensor([matrix], dtype=torch.float32)
    return data.warp(planes[None], torch.tensor([[48, 48]]), 48, "imagenet", TASKS, matrix)


def test_a_warp_without_augmentation_is_the_image_and_a_mirrored_one_mirrors_every_map():
    planes = a_scene()
    images, targets = warped(planes)
    truth = data.targets(planes[None], passes=2)
    assert all((targets[task] == truth[task]).all() for task in TASKS)
    np.testing.assert_allclose(images, data.normalise(planes[None, :3].float(), "imagenet"), atol=1e-4)
    mirrored_images, mirrored = warped(planes, ((-1, 0), (0, 1)))
    np.testing.assert_allclose(mirrored_images, images.flip(3), atol=1e-4)
    for task in ("semseg", "human_parts", "sal"):
        assert (mirrored[task] == targets[task].flip(2)).all()
    normals = targets["normals"].flip(3) * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    np.testing.assert_allclose(mirrored["normals"], normals, atol=1e-6)


def test_normals_turn_with_their_image():
    """A quarter turn: what pointed right points down, and the pixel at the right is found at the bottom."""
    planes = a_scene(labels=284)
    planes[3:6] = torch.tensor([255, 127, 127])[:, None, None]
    planes[7], planes[7, 24, 40] = 0, 7
    _, targets = warped(planes, ((0, 1), (-1, 0)))
    x, y, _ = targets["normals"][0, :, 24, 24].tolist()
    assert abs(x) < 0.01 and y > 0.99
    assert targets["semseg"][0].argmax().item() == 40 * 48 + 23


def test_outside_of_the_image_nothing_is_true_and_no_edge_arises():
    _, targets = warped(a_scene(labels=284), ((1.5, 0), (0, 1.5)))
    for task in ("semseg", "sal"):
        assert (targets[task][0, :7] == IGNORE).all() and (targets[task][0, :, :7] == IGNORE).all()
    assert not targets["normals"][0, :, :7].any()
    assert not (targets["edge"] == 1).any()


def test_images_of_several_sizes_share_a_batch(mini):
    dataset = data.PascalContext(mini, "train", 32)
    batch, *single = (data.warp(*canvas, 32, "imagenet")
                      for canvas in dataset.canvases([[0, 1, 2], [0], [1], [2]], "cpu"))
    for i, alone in enumerate(single):
        np.testing.assert_allclose(batch.images[i], alone.images[0], atol=1e-4)
        for task in set(TASKS) - {"normals"}:
            assert (batch.targets[task][i] == alone.targets[task][0]).all()


def test_random_warps_stay_in_their_ranges():
    matrices = data.random_warps(2000, torch.Generator().manual_seed(0))
    scale = matrices.det().abs().rsqrt()
    assert 0.75 <= scale.min() < 0.76 and 1.24 < scale.max() <= 1.25001
    assert 0.45 < (matrices.det() < 0).float().mean() < 0.55
    angle = torch.atan2(matrices[:, 1, 0].abs(), matrices[:, 1, 1].abs()).rad2deg()
    assert 19.5 < angle.max() <= 20.001


# The cache.


def test_the_cache_holds_the_maps_that_are_asked_for_and_a_later_task_adds_its_own(mini, tmp_path):
    ids = data.read_ids(mini, "train")

    def build(*tasks):
        folder = data.build_cache(mini, ids, tasks, tmp_path)
        cached, files = (data.PascalContext(mini, "train", 32, tasks, cache) for cache in (folder, None))
        assert all((cached.planes(i) == files.planes(i)).all() for i in range(13))
        return tree(folder)

    before = build("semseg")
    assert {path.parent.name for path in before} == {"image", "semseg"}
    after = build("normals", "semseg")
    assert {path.parent.name for path in after} == {"image", "semseg", "normals", "labelmap"}
    assert before.items() <= after.items()


@pytest.mark.parametrize("harm", [
    lambda path: path.write_bytes(path.read_bytes()[:-9]), lambda path: path.write_bytes(b""),
    lambda path: path.write_text("no array"), lambda path: np.save(path, np.zeros((3, 2, 2), np.uint8)),
    lambda path: np.save(path, np.zeros((1, 36, 48))), lambda path: np.save(path, {"an": "object"}),
    lambda path: os.utime(path, (1, 1))])
def test_a_file_of_the_cache_that_is_cut_foreign_or_older_than_its_source_is_made_again(mini, tmp_path, harm):
    files = data.PascalContext(mini, "train", 32, ["semseg"])
    files.ids = files.ids[:2]
    before = tree(data.build_cache(mini, files.ids, ["semseg"], tmp_path))
    stale = tmp_path / "semseg/2008_000001.npy"
    harm(stale)
    data.build_cache(mini, files.ids, ["semseg"], tmp_path)
    cached = data.PascalContext(mini, "train", 32, ["semseg"], tmp_path)
    assert (cached.planes(0) == files.planes(0)).all()
    after = tree(tmp_path)
    assert after.pop(stale) != before.pop(stale) and after == before


def test_a_cache_is_not_taken_for_that_of_other_files(mini, broken, tmp_path):
    """Of the same ids and sizes, but written at another time; an image that another size has replaced."""
    labelmap, image = data.find(broken, "labelmap", "2008_000001"), data.find(broken, "image", "2008_000003")
    labels((36, 48), np.full((36, 48), 3))(labelmap)
    Image.new("RGB", (31, 23)).save(image)
    for path in labelmap, image:
        os.utime(path, (9, 9))
    cases = (mini, ["sal", "edge"], (0, 2)), (broken, ["edge"], (0,)), (broken, ["sal"], (2,))
    for root, tasks, chosen in cases:
        files, cached = (data.PascalContext(root, "train", 32, tasks, cache) for cache in (None, tmp_path))
        ids, trees = [files.ids[i] for i in chosen], []
        for _ in range(2):
            trees.append(tree(data.build_cache(root, ids, tasks, tmp_path)))
            assert all(np.array_equal(cached.planes(i), files.planes(i)) for i in chosen)
        assert trees[0] == trees[1]  # the second time nothing is to be done


def test_batches_from_the_cache_are_those_from_the_files_and_come_faster(tmp_path):
    """`pytest test_ase.py -k come_faster -s` prints the rates, for 500-pixel images and batches at 224."""
    data.make_demo(tmp_path / "demo", 4, 1, 500)
    files = data.PascalContext(tmp_path / "demo", "train", 224)
    cache = data.build_cache(files.root, files.ids, TASKS, tmp_path / "cache")
    cached = data.PascalContext(tmp_path / "demo", "train", 224, TASKS, cache)
    warps = data.random_warps(4, torch.Generator().manual_seed(0)).split(2)

    def batches(dataset, workers=0):
        canvases = dataset.canvases([[0, 1], [2, 3]], torch.device("cpu"), workers)
        return [data.warp(*canvas, 224, "half", TASKS, matrices) for canvas, matrices in zip(canvases, warps)]

    for one, other in zip(batches(files), batches(cached, workers=2), strict=True):
        assert torch.equal(one.images, other.images)
        assert all(torch.equal(one.targets[task], other.targets[task]) for task in TASKS)
    for job in (lambda dataset: [dataset.planes(i) for i in range(4)], batches):  # read alone, and warped
        times = []
        for dataset in (files, cached):
            start = time.perf_counter()
            for _ in range(3):
                job(dataset)
            times.append(time.perf_counter() - start)
        from_files, from_cache = (12 / seconds for seconds in times)
        print(f"\nimages/s: {from_files:.0f} from the files, {from_cache:.0f} from the cache", end="")
        assert times[0] > (3 if job is not batches else 1) * times[1]


def test_a_cache_that_cannot_be_written_is_one_line(mini, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.UserError, match="cannot write the cache .*--cache DIR"):
        data.build_cache(mini, data.read_ids(mini, "train"), TASKS, tmp_path / "file")


# The demo, and the check.


def test_the_demo_is_deterministic_and_agrees_with_itself(mini):
    one, two = data.scene(5, 48, 36), data.scene(5, 48, 36)
    assert all((one[name] == two[name]).all() for name in one if name != "objects")
    np.testing.assert_allclose(np.linalg.norm(one["normals"], axis=2), 1, atol=1e-4)
    for kind, index, mask, parts in one["objects"]:
        assert data.VOC_CLASSES[index] == kind
        assert set(np.unique(one["semseg"][mask])) <= {index, IGNORE}
        assert all(not (part & ~mask).any() for _, part in parts)
    assert len({data.PascalContext(mini, "train", 32)[i][0].shape for i in range(8)}) >= 5
    train_ids, val_ids = (set(data.read_ids(mini, split)) for split in ("train", "val"))
    assert len(train_ids) == 13 and len(val_ids) == 7 and not train_ids & val_ids


@pytest.fixture
def check(broken, tmp_path, capsys, monkeypatch):
    """python data.py broken, in an empty folder: its exit code and what it prints."""
    def run(*flags):
        capsys.readouterr()
        code = data.main([str(broken), *flags])
        return code or 0, capsys.readouterr().out

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return run


def test_the_check_passes_a_good_set_and_draws_it(check):
    code, told = check()
    assert code == 0 and "a training could start\n" in told and "as expected" in told
    assert drawn(Path("contact_broken.png"))


def test_the_check_counts_what_an_image_that_is_missing_leaves(broken, check):
    shutil.rmtree(broken / "human_parts")
    (broken / "JPEGImages/2008_000001.jpg").unlink()
    Image.open(broken / "JPEGImages/2008_000003.jpg").save(data.find(broken, "semseg", "2008_000003"))
    code, told = check()
    counts = {line.split()[1]: line.split()[2:] for line in told.splitlines() if line.startswith("train ")}
    assert counts["human_parts"] == ["13", "0", "13", "0", "0", "0"] and counts["image"][1:3] == ["12", "1"]
    assert counts["sal"] == ["13", "13", "0", "0", "0", "0"] and counts["semseg"][5] == "1"
    assert code == 1 and "has colours: expected one channel" in told


def test_the_check_remarks_on_what_is_legal_but_odd(broken, check):
    """LabelMap 0, and saliency and normals of another size, which are resized when read."""
    scipy.io.savemat(broken / "pascal-context/trainval/2009_000002.mat",
                     {"LabelMap": 0 * data.read_map(broken, "labelmap", "2009_000002", None)[0]})
    Image.new("L", (24, 18), 255).save(broken / "sal_distill/2008_000001.png")
    Image.new("RGB", (9, 7), (128, 0, 128)).save(broken / "normals_distill/2010_000001.png")
    code, told = check()
    assert code == 0 and "remark: 1 images, labelmap with LabelMap 0 somewhere" in told
    for name in ("sal", "normals"):
        assert f"remark: 1 images, {name} of another size than its image (legal: resized)" in told
    (_, first), (_, second) = (data.PascalContext(broken, split, 32)[0] for split in ("train", "val"))
    assert (first["sal"] == 1).all()
    up = second["normals"][:, second["normals"].any(0)]
    assert up.numel() and (up[1] < -0.99).all()


def test_the_check_names_ids_in_both_lists_and_sees_normals_upside_down(broken, check):
    for path in (broken / "normals_distill").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) ^ np.array([0, 255, 0], np.uint8)).save(path)
    (broken / "ImageSets/Context/val.txt").write_text("2008_000001")
    code, told = check()
    assert code == 1 and "in both train.txt and val.txt: 1 ids, 2008_000001" in told
    assert "UPSIDE DOWN" in told


# ----------------------------------------------------------------------------------------- losses and metrics


def random_maps(task, shape=(3, 7, 5), seed=0):
    """A raw prediction and a target with ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(shape[0], TASKS[task].channels, *shape[1:], generator=generator)
    known = torch.rand(shape, generator=generator) < 0.7
    if task == "normals":
        truth = F.normalize(torch.randn(prediction.shape, generator=generator), dim=1)
        return prediction, truth * known[:, None]
    high = max(2, TASKS[task].channels)
    return prediction, torch.randint(high, shape, generator=generator).masked_fill(~known, IGNORE)


def loss_by_hand(task, prediction, target):
    pixels = []
    for b, y, x in itertools.product(*map(range, (prediction.shape[0], *prediction.shape[2:]))):
        p, t = prediction[b, :, y, x].tolist(), target[b, ..., y, x].tolist()
        if task == "normals" and any(t):
            length = math.sqrt(sum(v * v for v in p))
            pixels.append(sum(abs(v / length - w) for v, w in zip(p, t)) / 3)
        elif task != "normals" and t != IGNORE:
            pixels.append((p, t))
    if task == "normals":
        return sum(pixels) / len(pixels)
    if TASKS[task].channels > 1:
        return sum(math.log(sum(map(math.exp, p))) - p[t] for p, t in pixels) / len(pixels)
    w = 0.95 if task == "edge" else sum(t == 0 for _, t in pixels) / len(pixels)
    return sum(math.log(1 + math.exp(-p[0])) * w if t else math.log(1 + math.exp(p[0])) * (1 - w)
               for p, t in pixels) / len(pixels)


@pytest.mark.parametrize("task", TASKS)
def test_each_loss_is_the_loop_over_pixels(task):
    prediction, target = random_maps(task)
    loss = evaluate.losses({task: prediction}, {task: target})[task]
    assert loss.item() == pytest.approx(loss_by_hand(task, prediction, target), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_losses_of_parts_add_up_to_that_of_the_batch(task):
    prediction, target = random_maps(task)
    counts = evaluate.count_pixels({task: target})
    parts = [evaluate.losses({task: p}, {task: t}, counts)[task] for p, t in
             zip(prediction.split([2, 1]), target.split([2, 1]))]
    whole = evaluate.losses({task: prediction}, {task: target})[task]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_without_any_truth_a_loss_is_zero_and_its_gradient_too(task):
    prediction, target = random_maps(task)
    prediction.requires_grad_()
    nothing = target * 0 + (0 if task == "normals" else IGNORE)
    loss = evaluate.losses({task: prediction}, {task: nothing})[task]
    loss.backward()
    assert loss.item() == 0 and not prediction.grad.any()


def test_miou_against_sets_of_pixels():
    prediction, truth = rng.integers(0, 5, (11, 13)), rng.integers(0, 4, (11, 13))
    truth[rng.random(truth.shape) < 0.2] = IGNORE
    scores = []
    for c in range(7):
        p, t = ({tuple(i) for i in np.argwhere((m == c) & (truth != IGNORE)).tolist()}
                for m in (prediction, truth))
        if p | t:
            scores.append(len(p & t) / len(p | t))
    metric = evaluate.METRICS["miou"]
    assert metric.value(metric.count(prediction, truth, 7, None)) == pytest.approx(100 * np.mean(scores))
    assert math.isnan(metric.value(np.zeros((7, 3), int)))


def test_a_gpu_without_native_bfloat16_computes_in_float32(monkeypatch):
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert data.precision(torch.device("cuda")) == expected
        assert data.precision(torch.device("cpu")) == torch.float32


def test_saliency_takes_the_best_threshold_of_the_mean_over_images():
    maps = [(rng.random((7, 11)), rng.integers(0, 2, (7, 11))), (np.zeros((5, 3)), np.zeros((5, 3), int))]
    total = sum(evaluate.METRICS["max_iou"].count(p, t, 1, None) for p, t in maps)
    best = 0
    for n in range(20, 91, 5):
        found = maps[0][0] > n / 100
        union = (found | (maps[0][1] == 1)).sum()
        best = max(best, ((found & (maps[0][1] == 1)).sum() / union + 1) / 2)
    assert evaluate.METRICS["max_iou"].value(total) == pytest.approx(100 * best)


def test_angles_between_normals():
    truth = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]).T.reshape(3, 1, 4)
    turned = np.array([[0.0, 1, 0], [0, math.cos(0.3), math.sin(0.3)], [0, 0, -1], [1, 0, 0]])
    turned = turned.T.reshape(3, 1, 4)
    total = evaluate.METRICS["angle"].count(turned, truth, 3, None)
    assert total[1] == 3 and total[0] == pytest.approx(90 + math.degrees(0.3) + 180)


def test_delta_m_gives_every_row_of_table_1():
    rows = {-1.29: (58.4, 15.9, 51.8, 62.6, 50.3), -1.74: (58.9, 16.4, 51.9, 62.2, 50.6),
            0.13: (59.7, 15.5, 51.7, 62.7, 51.5), 0.66: (60.4, 15.4, 51.6, 63.1, 51.7),
            2.68: (69.1, 16.2, 54.8, 61.9, 49.9), 6.06: (73.7, 17.5, 59.2, 62.9, 53.7),
            6.11: (73.8, 17.4, 59.3, 62.9, 53.3), 7.49: (74.0, 17.3, 60.1, 63.2, 55.3),
            7.58: (74.0, 17.2, 60.3, 63.3, 54.9)}
    for expected, (seg, normals, parts, sal, edge) in rows.items():
        metrics = {"semseg": seg, "human_parts": parts, "sal": sal, "edge": edge, "normals": normals}
        found = evaluate.delta_m(metrics, evaluate.BASELINES["resnet18"])
        assert found == pytest.approx(expected, abs=0.0101)
    with pytest.raises(data.UserError, match="normals is missing"):
        evaluate.delta_m(metrics, {"semseg": 1, "human_parts": 1, "sal": 1, "edge": 1})


def test_each_image_is_judged_once_and_the_number_of_workers_changes_no_bit(mini, monkeypatch):
    model = ase.ASE(ase.Config(image=32, dim=12, depth=1, heads=2, head_dim=8, experts=3, topk=1, rank=2))
    dataset = data.PascalContext(mini, "val", 32)
    results = []
    for cores in (1, 3):
        monkeypatch.setattr(data, "cores", lambda: cores)
        results.append(evaluate.accumulate(model, dataset, "half", torch.device("cpu")))
    for task in TASKS:
        for one, three in zip(*results):
            np.testing.assert_array_equal(one[task], three[task])
    truths = [dataset[i][1] for i in range(7)]
    for task in ("semseg", "human_parts"):
        known = torch.cat([truth[task].flatten() for truth in truths])
        expected = known[known != IGNORE].bincount(minlength=TASKS[task].channels)
        assert results[0][0][task][:, 2].tolist() == expected.tolist()
    labels = [scipy.io.loadmat(data.find(mini, "labelmap", id))["LabelMap"] for id in dataset.ids]
    assert results[0][0]["edge"][0, 2] == sum(slow_thin(slow_seg2bmap(x)).sum() for x in labels)
    assert set(evaluate.evaluate(model, dataset, "half")) == set(TASKS)


def test_validation_losses_do_not_depend_on_the_batch(mini):
    """Seven images in batches of 1, 3 or 7: the last, incomplete one counts as it should."""
    model = ase.ASE(ase.Config(image=32, dim=12, depth=1, heads=2, head_dim=8, experts=3, topk=1, rank=2))
    dataset = data.PascalContext(mini, "val", 32)
    losses, routings = zip(*(train.validate(model, dataset, {"batch": batch, "mean_std": "half"}, 0)
                             for batch in (1, 3, 7)))
    for found, expected in itertools.chain(zip(routings[1], routings[0]), zip(routings[2], routings[0])):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for task in set(TASKS) - {"sal"}:  # saliency's weights are those of the batch
        assert losses[0][task] == pytest.approx(losses[1][task], rel=1e-5)
        assert losses[0][task] == pytest.approx(losses[2][task], rel=1e-5)


# ----------------------------------------------------------------------------------------------- the commands

SHORT = "--weights none --size 32 --epochs 2 --batch 4 --experts 4 --topk 2 --rank 2 --device cpu".split()


def flags(root, out, more=""):
    """What train.py is told for a short run into the folder `out`; the cache lies beside the data set."""
    return ["--data", str(root), "--cache", f"{root}-cache", "--out", str(out), *SHORT, *more.split()]


@pytest.fixture(scope="module")
def trained(mini, tmp_path_factory):
    """A finished run on the small demo, which no test changes."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.main(flags(mini, out))
    return out


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the finished run, with nothing in it but what training has written."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def fails(capsys):
    """What a command says that ends in exit code 2: one line on stderr, no traceback."""
    def run(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.fixture
def table(capsys, monkeypatch, tmp_path):
    """What evaluate.py prints, in a folder of its own. Its workers are threads here, which start at once."""
    def run(*argv):
        capsys.readouterr()
        evaluate.main([*map(str, argv), "--device", "cpu"])
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "workers", lambda: ThreadPoolExecutor(2))
    return run


def settings_of(run, **changes):
    """A run's config.json, changed and written."""
    settings = json.loads((run / "config.json").read_text()) | changes
    (run / "config.json").write_text(json.dumps(settings))
    return settings


def weights_of(run):
    return evaluate.load_checkpoint(run / "checkpoint.pt")["model"]


def logged(run, kind):
    return [record for record in evaluate.read_log(run) if record["kind"] == kind]


def result_of(path):
    """A result; a strict reader of JSON knows no NaN."""
    text = path.read_text(encoding="ascii")
    assert "NaN" not in text
    return json.loads(text)


# Training.


def test_weight_decay_acts_on_matrices_alone():
    """Not on biases and norms, nor on task embeddings, however they are stored."""
    for change, pretrained in ((dict(), True), (dict(experts=0), True), (dict(experts=0), False)):
        model = ase.ASE(small(**change))
        names = {id(p): name for name, p in model.named_parameters()}
        norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm))]
        vectors = {id(p) for norm in norms for p in norm.parameters()}
        found = set()
        for group in train.parameter_groups(model, pretrained):
            for p in group["params"]:
                name = names[id(p)]
                found.add(name)
                vector = id(p) in vectors or name.endswith("bias") or name.startswith("task_embedding")
                assert group["weight_decay"] == (0 if vector else 0.01), name
                slow = change and pretrained and not re.match("heads|task", name)
                assert group["lr_scale"] == (0.1 if slow else 1), name
        assert found == {name for name, p in model.named_parameters() if p.requires_grad}


class Stacked(ase.LoRAExperts):
    """The routers of all tasks as one parameter, (T, D, N), and their noise as another."""

    def __init__(self, **of):
        super().__init__(**of)
        for name in ("router", "router_noise"):
            matrices = torch.stack([*getattr(self, name).values()])
            delattr(self, name)
            setattr(self, name, nn.Parameter(matrices.detach()))

    def logits(self, x):
        x = x.flatten(1, -2)
        noise = torch.randn(*x.shape[:2], self.router.shape[-1], dtype=x.dtype)
        return x @ self.router + noise * (F.softplus(x @ self.router_noise) + 0.01)


def test_named_routers_learn_as_stacked_ones_do():
    config, results = small(), []
    images = random(3, 3, 8, 8)
    for stacked in (False, True):
        torch.manual_seed(0)
        model = ase.ASE(config).double().train()
        for block in model.blocks:
            block.experts.up.data = random(*block.experts.up.shape)
            if stacked:
                named, block.experts = block.experts, experts_of(config, Stacked).double()
                own = named.state_dict()
                state = {name: torch.stack([own[f"{name}.{task}"] for task in config.tasks])
                         for name in ("router", "router_noise")}
                block.experts.load_state_dict(state | {name: own[name] for name in ("down", "up")})
        optimizer = torch.optim.AdamW(train.parameter_groups(model, False), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            predictions, routing = model(images)
            loss = sum(y.square().mean() for y in predictions.values())
            loss = loss - ase.mutual_information(routing.probs).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state = {name: p for name, p in model.state_dict().items() if ".router" not in name}
        for i, block in enumerate(model.blocks):
            for name in ("router", "router_noise"):
                p = getattr(block.experts, name)
                state[f"{i}.{name}"] = p if stacked else torch.stack([*p.values()])
        results.append(state)
    torch.testing.assert_close(*results)


def test_three_steps_are_those_written_out(mini, tmp_path):
    """Losses times 1, 2, 5, 50, 10, less 3 times the mutual information; the gradient cut to a norm of 10;
    AdamW with decay 0.01 of the matrices; a rate of 0.01 in step 1 (warm-up) and 2, half of it in step 3."""
    train.main(flags(mini, tmp_path / "run", "--epochs 3 --batch 13 --mi 3 --noise 0 --lr 0.01 --seed 5"))
    torch.manual_seed(5)
    model = ase.ASE(evaluate.open_run(tmp_path / "run").config)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in learned.items()}
    norms = []
    for step, rate in enumerate((0.01, 0.01, 0.005)):
        order, warps = train.shuffle(13, step, 5)
        canvas = data.PascalContext(mini, "train", 32).canvas(order)
        batch = data.warp(*canvas, 32, "imagenet", target_to_source=warps[order])
        predictions, routing = model(batch.images)
        losses = evaluate.losses(predictions, batch.targets)
        p = routing.probs
        loss = -3 * (p * (p / p.mean(1, keepdim=True)).log()).sum() / 5
        for task, weight in zip(("semseg", "human_parts", "sal", "edge", "normals"), (1, 2, 5, 50, 10)):
            loss = loss + weight * losses[task]
        gradients = torch.autograd.grad(loss, list(learned.values()))
        norms.append(math.sqrt(sum(g.double().square().sum().item() for g in gradients)))
        with torch.no_grad():
            for (name, p), g in zip(learned.items(), gradients):
                g = g * min(1, 10 / norms[-1])
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * g)
                second.mul_(0.999).add_(0.001 * g * g)
                vector = p.dim() < 2
                p -= rate * (0 if vector else 0.01) * p
                mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                p -= rate * mean / (square.sqrt() + 1e-8)
    assert max(norms) > 10 > min(norms)
    found = weights_of(tmp_path / "run")
    errors = torch.cat([(found[name] - p.detach()).abs().flatten() for name, p in learned.items()])
    # Adam enlarges the rounding of the few gradients that are nearly zero
    assert errors.quantile(0.99) < 1e-5 and errors.max() < 0.005, (errors.quantile(0.99), errors.max())


def test_four_images_are_learned_by_heart(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "random_warps", lambda number, _: torch.eye(2).expand(number, 2, 2))
    data.make_demo(tmp_path / "four", 4, 1, 48, seed=5)  # people in two
    train.main(flags(tmp_path / "four", tmp_path / "run", "--epochs 50 --lr 5e-3 --batch 2"))
    first, *_, last = (np.array([*record["losses"].values()]) for record in logged(tmp_path / "run", "step"))
    assert (last / first < [0.3, 0.3, 0.5, 0.8, 0.5]).all(), last / first


def test_a_divided_batch_means_the_same_as_a_whole_one(mini, tmp_path):
    """The counts that losses divide by are the whole batch's: some images have no parts, all have void."""
    # at a low rate: Adam's steps amplify the rounding of gradients that are nearly zero
    argv = {out: flags(mini, tmp_path / out, "--mi 0 --noise 0 --lr 1e-4 --epochs 3")
            for out in ("whole", "micro-batches", "processes")}
    train.main(argv["whole"])
    train.main([*argv["micro-batches"], "--micro-batch", "3"])
    # --standalone: at a free port
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launch, ROOT / "train.py", *argv["processes"]], check=True, stdout=subprocess.DEVNULL,
                   env=dict(os.environ, OMP_NUM_THREADS="1"))
    for out in argv:
        records, weights = evaluate.read_log(tmp_path / out), weights_of(tmp_path / out)
        epochs = logged(tmp_path / out, "epoch")
        losses = torch.tensor([[*r.get("losses", r.get("val")).values()] for r in records])
        gates = torch.tensor([r["gates"] for r in epochs])
        norms = torch.tensor([r["norm"] for r in logged(tmp_path / out, "step")])  # Adam hides a factor
        numbers = [losses, gates / 10, norms / 1000, *weights.values()]
        found = [r["kind"] for r in records], [*weights], numbers
        if out == "whole":
            expected = found
        assert found[:2] == expected[:2]  # each record is written once
        for one, other in zip(found[2], expected[2]):
            np.testing.assert_allclose(one, other, atol=1e-4, err_msg=out)


def test_the_regulariser_of_micro_batches_counts_by_their_images(mini, tmp_path, monkeypatch):
    """With a linear function in the place of mutual information the parts add up to the whole."""
    monkeypatch.setattr(ase, "mutual_information", lambda p: (p * torch.arange(p.shape[-1])).sum((1, 2)))
    for out in ("whole", "parts --micro-batch 3"):
        train.main(flags(mini, tmp_path / out.split()[0], f"--mi 1 --noise 0 --lr 1e-4 {out[5:]}"))
    for whole, parts in zip(*(logged(tmp_path / out, "step") for out in ("whole", "parts"))):
        assert parts["norm"] == pytest.approx(whole["norm"], rel=1e-4)


def test_each_epoch_has_an_order_and_warps_of_its_own():
    (order, warps), (other, others), (again, _) = (train.shuffle(101, epoch, 3) for epoch in (0, 1, 0))
    assert order.tolist() == again.tolist() != other.tolist() and sorted(order.tolist()) == list(range(101))
    assert (warps != others).any()


def test_pretrained_weights_are_taken_and_stay(mini, tmp_path):
    tiny = backbone_of(ase.Config(**ase.BACKBONES["vit_tiny"] | {"image": 32}))
    torch.save(tiny, tmp_path / "vit.pt")
    train.main(flags(mini, tmp_path / "run", f"--epochs 1 --weights {tmp_path / 'vit.pt'}"))
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(after[name], x) for name, x in tiny.items())


def test_a_demo_starts_from_the_backbone_that_comes_with_the_project(mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = flags(mini, "run", "--epochs 1")
    del argv[argv.index("--weights"):argv.index("--weights") + 2]
    train.main(argv)
    shipped, after = ase.load(train.OWN_BACKBONE), weights_of(Path("run"))
    assert shipped.keys() == vit_names(4) and train.OWN_BACKBONE.stat().st_size < 4e6
    assert all(torch.equal(after[name], x.float()) for name, x in shipped.items() if name != "pos_embed")


def test_pretraining_goes_on_after_a_kill_and_its_file_is_one_like_any_other(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(train, "PRETRAIN", dict(images=12, held_out=8, epochs=2, batch=4, lr=1e-3, seed=0))
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    train.main(["--pretrain", str(whole)])

    def kill(step, *of):
        assert step < 4, "killed"
        return rate(step, *of)

    rate = train.learning_rate
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="killed"):
        patch.setattr(train, "learning_rate", kill)
        train.main(["--pretrain", str(killed)])
    assert not killed.exists()
    train.main(["--pretrain", str(killed)])
    found, expected = ase.load(killed), ase.load(whole)
    assert all(torch.equal(found[name], x) and x.dtype == torch.half for name, x in expected.items())
    torch.manual_seed(0)
    fresh = ase.ASE(ase.Config(**ase.BACKBONES["vit_tiny"], experts=0, tasks={"classes": 20}))
    before = {name: p.half() for name, p in fresh.named_parameters()}
    still = {name for name, x in expected.items() if torch.equal(x, before[name])}
    assert still == {"patch_embed.proj.weight", "patch_embed.proj.bias"}  # these stay random
    assert f"{len(vit_names(4))} tensors loaded" in ase.load_backbone(fresh, whole)
    facts = json.loads((tmp_path / "whole.json").read_text())
    assert facts["images"] == 12 and 0 <= facts["f1"] <= 1 and len(list(tmp_path.iterdir())) == 4
    assert "exists" in fails(train.main, "--pretrain", whole)
    (tmp_path / "bad.pt.partial").write_text("no checkpoint")
    assert "bad.pt.partial" in fails(train.main, "--pretrain", tmp_path / "bad.pt")


@pytest.mark.parametrize("more", ["--lora 0", "--experts 0", "--experts 0 --lora 3 --tasks normals,sal",
                                  "--noise 0 --gating fixed"])
def test_the_ways_to_train(mini, tmp_path, table, more):
    """From the flags to a table: what each trains differs from where it started, all else stays."""
    train.main(flags(mini, tmp_path / "run", "--epochs 1 " + more))
    table(tmp_path / "run")
    config, after = evaluate.open_run(tmp_path / "run").config, weights_of(tmp_path / "run")
    torch.manual_seed(0)
    before = dict(ase.ASE(config).named_parameters())
    moved = {name for name, p in before.items() if (p != after[name]).any()}
    assert moved == {name for name, p in before.items() if p.requires_grad}
    assert list(result_of(tmp_path / "run/metrics.json")["metrics"]) == list(config.tasks)


@pytest.mark.parametrize("flag", ["--compile", "--checkpointing"])
def test_compiling_and_recomputing_change_no_weight(mini, trained, tmp_path, monkeypatch, flag):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager", fullgraph=True))
    train.main(flags(mini, tmp_path / "run", flag))
    found = weights_of(tmp_path / "run")
    for name, expected in weights_of(trained).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_learns_as_the_cpu_does(mini, tmp_path):
    for device in ("cpu", "cuda"):
        train.main(flags(mini, tmp_path / device, f"--noise 0 --device {device}"))
        evaluate.main([str(tmp_path / device), "--device", device])
    for cpu, gpu in zip(*(logged(tmp_path / device, "step") for device in ("cpu", "cuda")), strict=True):
        assert gpu["losses"] == pytest.approx(cpu["losses"], rel=0.05)


# What a run folder holds, and how a run goes on.


def test_the_log_holds_steps_and_epochs_and_what_the_routers_do_in_use(mini, trained):
    """Their means are over the validation images, taken here one at a time, and without noise."""
    steps, epochs = logged(trained, "step"), logged(trained, "epoch")
    assert [r["step"] for r in steps] == [3, 6] and [r["epoch"] for r in epochs] == [1, 2]
    for losses in [r["losses"] for r in steps] + [r["val"] for r in epochs]:
        assert set(losses) == set(TASKS) and all(map(math.isfinite, losses.values()))
    model = evaluate.load_model(evaluate.open_run(trained), torch.device("cpu"))
    canvases = data.PascalContext(mini, "val", 32).canvases([[i] for i in range(7)], "cpu")
    routings = [model(data.warp(*canvas, 32, "imagenet").images)[1] for canvas in canvases]
    probs, gates, power = (torch.stack(x).mean(0).detach().numpy() for x in zip(*routings))
    np.testing.assert_allclose(epochs[-1]["gates"], gates, atol=1e-5)
    np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-5)  # joint gates
    np.testing.assert_allclose(epochs[-1]["shared_mass"], gates[..., 0], atol=1e-5)
    information = (probs * np.log(probs / probs.mean(1, keepdims=True))).sum((1, 2)) / 5
    np.testing.assert_allclose(epochs[-1]["mutual_information"], information, atol=1e-5)
    np.testing.assert_allclose(epochs[-1]["scale"], np.sqrt(power), atol=1e-5)


@pytest.mark.parametrize("more, parts", [
    ("--shared 2 --topk 1", ["LoRA", "shared experts", "sparse experts"]),
    ("--shared 0", ["LoRA", "sparse experts"]), ("--experts 0", ["backbone"])])
def test_conflicts_are_the_angles_between_the_gradients_of_single_losses(mini, tmp_path, table, more, parts):
    """And whether they are measured changes no weight, neither in one part nor in micro-batches."""
    argv = "--epochs 1 --micro-batch 2 " + more
    for out, conflict in (("plain", ""), ("run", "--conflict")):
        train.main(flags(mini, tmp_path / out, f"{argv} {conflict}"))
    table(tmp_path / "run")
    plain, run = (weights_of(tmp_path / out) for out in ("plain", "run"))
    assert all((run[name] == p).all() for name, p in plain.items()) and drawn(tmp_path / "run/conflicts.png")
    model = evaluate.load_model(evaluate.open_run(tmp_path / "run"), torch.device("cpu"))
    batch = data.warp(*data.PascalContext(mini, "train", 32).canvas(range(13)), 32, "imagenet")
    gradients = {part: [] for part in parts}
    for task in TASKS:
        model.zero_grad()
        evaluate.losses(model(batch.images)[0], batch.targets)[task].backward()
        of = {part: [] for part in parts}
        for name, p in model.named_parameters():
            if re.search(r"experts\.(up|down)$", name):
                s = model.config.shared
                of["sparse experts"].append(p.grad[s:].flatten())
                if s:
                    of["shared experts"].append(p.grad[:s].flatten())
            elif p.requires_grad and not re.search("heads|router|embedding", name):
                of["LoRA" if "lora" in name else "backbone"].append(p.grad.flatten())
        for part in parts:
            gradients[part].append(torch.cat(of[part]).numpy())
    (record,) = logged(tmp_path / "run", "epoch")
    assert set(record["conflict"]) == set(parts)
    for part, g in gradients.items():
        expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in g] for b in g]
        np.testing.assert_allclose(record["conflict"][part], expected, atol=1e-4)
    pairs = [expected[i][j] for i in range(5) for j in range(i)]
    share, mean = evaluate.opposed(expected)
    assert share == sum(x < 0 for x in pairs) / 10 and mean == pytest.approx(sum(pairs) / 10)
    assert evaluate.opposed([[1, -0.5, 0], [-0.5, 1, 0], [0, 0, 0]]) == (1, -0.5)  # the third has no truth


@pytest.mark.parametrize("extend", [False, True])
def test_a_killed_training_resumes_to_the_same_bits(mini, trained, tmp_path, extend):
    """Killed when the second checkpoint is written, but not yet in the place of the first."""
    more = ""
    if extend:
        train.main(flags(mini, tmp_path / "base", "--epochs 1 --tasks sal"))
        more = f"--extend {tmp_path}/base --tasks edge"
        trained = tmp_path / "whole"
        train.main(flags(mini, trained, more))
    script = ("import os, signal, sys, train\n"
              "replace = os.replace\n"
              "def killed(old, new):\n"
              "    if new.name == 'checkpoint.pt' and new.exists():\n"
              "        os.kill(os.getpid(), signal.SIGKILL)\n"
              "    replace(old, new)\n"
              "os.replace = killed\n"
              "train.main()\n")
    run, argv = tmp_path / "run", flags(mini, tmp_path / "run", more)
    other = tmp_path / "other"
    train.main(flags(mini, other, "--epochs 1 --tasks sal --lr 0.1"))
    number = str(torch.get_num_threads())
    threads = {f"{library}_NUM_THREADS": number for library in ("OMP", "MKL", "OPENBLAS")}
    code = subprocess.call([sys.executable, "-c", script, *argv], cwd=ROOT, stdout=subprocess.DEVNULL,
                           env=os.environ | threads)  # another number of threads rounds differently
    assert code == -signal.SIGKILL and evaluate.load_checkpoint(run / "checkpoint.pt")["epoch"] == 1
    assert list(run.glob("*.tmp")) and len(logged(run, "epoch")) == 2
    if extend:  # what the base has become since then does not matter
        shutil.copy(other / "checkpoint.pt", tmp_path / "base")
    train.main(argv)
    found = weights_of(run)
    assert all((found[name] == expected).all() for name, expected in weights_of(trained).items())
    assert [r["step"] for r in logged(run, "step")] == [3, 6] and not list(run.glob("*.tmp"))


@pytest.mark.parametrize("more", ["", "--experts 0", "--gating fixed --noise 0"])
def test_a_task_is_added_to_a_trained_model_and_changes_nothing_else(mini, tmp_path, table, more):
    """The other tasks' parameters to the bit and predictions to rounding; its own loss has weight 1."""
    base, run = tmp_path / "base", tmp_path / "run"
    train.main(flags(mini, base, "--epochs 1 --tasks semseg,edge " + more))
    written = tree(base)
    train.main(f"--extend {base} --tasks normals --out {run} --epochs 2 --batch 13".split())
    old, new, config = weights_of(base), weights_of(run), evaluate.open_run(run).config
    assert tree(base) == written and list(config.tasks) == ["semseg", "edge", "normals"]
    assert all((new[name] == p).all() for name, p in old.items())
    torch.manual_seed(0)
    alone = ase.ASE(evaluate.with_tasks(config, "normals"))
    fresh = {name: p for name, p in alone.named_parameters() if name not in old}
    assert new.keys() - old.keys() == fresh.keys() and all("normals" in name for name in fresh)
    assert all((new[name] != p).any() for name, p in fresh.items())

    for dtype, error in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        images = random(2, 3, 32, 32).to(dtype)
        before, after = (evaluate.load_model(evaluate.open_run(folder), "cpu").to(dtype)(images)[0]
                         for folder in (base, run))
        for task, y in before.items():
            assert (after[task] - y).abs().max() <= error * y.abs().max()
    assert all(list(record["losses"]) == ["normals"] for record in logged(run, "step"))
    if "--noise 0" in more:  # the norm of step 1, from the loss alone
        alone.load_state_dict(old, strict=False)
        order, warps = train.shuffle(13, 0, 0)
        canvas = data.PascalContext(mini, "train", 32, alone.config.tasks).canvas(order)
        batch = data.warp(*canvas, 32, "imagenet", alone.config.tasks, warps[order])
        loss = evaluate.losses(alone(batch.images)[0], batch.targets)["normals"]
        gradients = torch.autograd.grad(loss, [p for name, p in alone.named_parameters() if name in fresh])
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert logged(run, "step")[0]["norm"] == pytest.approx(norm, rel=1e-4)

    row = next(line for line in table(base, run).splitlines() if line.startswith(f"{run} "))
    assert row.split()[-1] == f"{sum(p.numel() for p in fresh.values()) / 1e6:.2f}"  # trained
    first, whole = (result_of(r / "metrics.json")["metrics"] for r in (base, run))
    assert list(whole) == list(config.tasks)
    assert first == pytest.approx({task: whole[task] for task in first}, abs=0.01)
    train.main(f"--extend {run} --tasks sal --out {tmp_path}/more --epochs 1".split())
    assert list(evaluate.open_run(tmp_path / "more").config.tasks) == ["semseg", "sal", "edge", "normals"]


def test_some_tasks_are_judged_alone_with_their_numbers(finished, table, monkeypatch):
    told = table(finished)
    passes, forward = [], ase.ASE.features

    def features(model, images):
        tokens, routing = forward(model, images)
        passes.append(len(tokens))
        return tokens, routing

    monkeypatch.setattr(ase.ASE, "features", features)
    told = table(finished, "--tasks", "edge,semseg")
    assert "metrics-tasks-semseg-edge.json, which is not the full default protocol" in told
    some = result_of(finished / "metrics-tasks-semseg-edge.json")["metrics"]
    whole = result_of(finished / "metrics.json")["metrics"]
    assert set(passes) == {2}
    assert some == pytest.approx({task: whole[task] for task in ("semseg", "edge")}, abs=0.01)
    assert drawn(finished / "predictions-tasks-semseg-edge.png")


@pytest.mark.parametrize("wrong, told", [
    ("--tasks sal", "has sal already: name a task that it lacks, --tasks semseg,human_parts,edge,normals"),
    ("--tasks depth", "unknown or named twice"), ("--tasks edge --rank 3", "--rank 3: .* has 2"),
    ("--tasks edge --experts 0", "--experts 0: .* has 4"),
    ("--tasks edge --backbone vit_small", "has vit_tiny"),
    ("--tasks edge --mean-std half", "has imagenet"), ("--tasks edge --weights x.pt", "leave the flag out"),
    ("--tasks edge --size 64", "has 32"), ("--tasks edge --data nowhere", "no data folder"),
    ("--tasks edge --out {base}", "name another one"), ("--tasks edge --conflict", "no --extend"),
    ("--tasks edge --data {lacking}", "missing")])
def test_what_cannot_extend_a_run_is_one_line(mini, broken, tmp_path, fails, wrong, told):
    base, out = tmp_path / "base", tmp_path / "run"
    train.main(flags(mini, base, "--epochs 1 --tasks sal"))
    shutil.rmtree(broken / "pascal-context")
    written = tree(base)
    argv = ["--extend", base, "--out", out, *wrong.format(base=base, lacking=broken).split()]
    assert re.search(told, fails(train.main, *argv))
    assert tree(base) == written and not {"log.jsonl", "checkpoint.pt"} & {p.name for p in out.glob("*")}
    if wrong == "--tasks sal":
        assert "no config.json" in fails(train.main, "--extend", tmp_path / "nowhere", "--tasks", "edge")
        settings_of(base, epochs=2)
        assert "1 of its 2 epochs" in fails(train.main, "--extend", base, "--tasks", "edge", "--out", out)


def test_a_finished_run_says_so_and_other_flags_are_named(trained, mini, fails, capsys):
    same = flags(mini, trained)
    assert not train.main(same) and "is finished" in capsys.readouterr().out
    for flag in ("--rank 3", "--seed 5", "--gating fixed", "--lr 0.5", "--tasks sal"):
        assert flag.split()[0] in fails(train.main, *same, *flag.split())


def test_a_data_set_has_one_name_however_it_is_typed(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(mini, tmp_path / "here/demo").parent)
    for n, name in enumerate(("demo", "./demo", "demo/", str(tmp_path / "here/demo"))):
        train.main(flags(name, "my run", f"--epochs 1 --cache {tmp_path}/cache"))
        told = capsys.readouterr().out
        assert ("is finished" in told) == (n > 0) and "next: python evaluate.py 'my run'" in told


def test_a_run_that_failed_before_its_first_checkpoint_blocks_no_other(broken, tmp_path, fails):
    run, source = tmp_path / "run", data.find(broken, "labelmap", "2008_000001")
    good = source.read_bytes()
    source.write_bytes(b"")
    fails(train.main, *flags(broken, run))
    assert settings_of(run)["seed"] == 0
    source.write_bytes(good)
    for name in (".checkpoint.pt.999999999.tmp", ".config.json.999999999.tmp"):  # left by a kill
        (run / name).write_text("{")
    (run / "log.jsonl").write_text('{"kind": "step", "los')
    train.main(flags(broken, run, "--seed 3 --epochs 1"))
    assert settings_of(run)["seed"] == 3 and not list(run.glob("*.tmp"))
    assert [r["kind"] for r in evaluate.read_log(run)] == ["step", "epoch"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("no run")
    assert "thesis.tex" in fails(train.main, *flags(broken, tmp_path / "other"))


def test_a_refusal_gives_the_command_that_works(mini, finished, tmp_path, fails, monkeypatch):
    """More epochs on a finished run, a loss that is not finite: the same flags, another folder."""
    finished = finished.rename(tmp_path / "my run")
    error = fails(train.main, *flags(mini, finished, "--epochs 1"))
    assert "is finished" in error
    monkeypatch.setitem(evaluate.LOSSES, "edge_bce", lambda p, *_: p.sum() * math.nan)
    other = fails(train.main, *flags(mini, tmp_path / "nan", "--epochs 1"))
    assert "the edge loss is not finite at step 1;" in other and "checkpoint" in other
    monkeypatch.undo()
    for error, out in ((error, "my run-2"), (other, "nan-2")):
        assert error.count("python train.py ") == 1
        train.main(shlex.split(error.split("python train.py ")[1]))
        assert evaluate.load_checkpoint(tmp_path / out / "checkpoint.pt")["epoch"] == 1


def test_a_run_of_an_earlier_version_is_judged_but_not_continued(finished, mini, table, fails):
    settings = settings_of(finished)
    del settings["noise"], settings["model"]["noise"], settings["extend"]
    (finished / "config.json").write_text(json.dumps(settings))
    assert "4/2/1/2" in table(finished)
    assert "earlier version" in fails(train.main, *flags(mini, finished))


def test_a_line_of_the_log_that_is_no_record_is_left_out(finished):
    whole = evaluate.read_log(finished)
    with open(finished / "log.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "st\n\xff\xfe\x00\n[1, 2]\n5\n{"step": 1, "epoch": 1}\n'
                   b'{"kind": "step", "epoch": 1}\n{"kind": "step", "step": "3", "epoch": 1}\n')
    assert evaluate.read_log(finished) == whole and len(whole) == 4


# Judging a run.


def test_evaluating_draws_remembers_and_tells(finished, table):
    told = table(finished)
    assert "4/2/1/2" in told and "constant" in told and "kept in metrics.json\n" in told
    assert f"{finished}: judged in" in told and "baseline: none for this data set" in told
    result = result_of(finished / "metrics.json")
    assert list(result)[0] == "metrics" and set(result["metrics"]) == set(TASKS) and result["images"] == 7
    assert result["delta_m"] is None
    for name in ("predictions", "experts", "curves", "edges"):
        assert drawn(finished / f"{name}.png")
    (finished / "curves.png").unlink()
    told = table(finished, "--baseline", finished)  # remembered: nothing is drawn again
    assert f"{finished}: kept in metrics.json from {result['judged']}" in told
    assert not (finished / "curves.png").exists()
    again = result_of(finished / "metrics.json")
    assert again["delta_m"] == pytest.approx(0, abs=1e-9) and again["metrics"] == result["metrics"]
    written = tree(finished)
    table(finished, "--baseline", finished)
    assert tree(finished) == written  # the same again needs no writing


def study_of(path, *rows, bases=None):
    """A study made by hand: (name, seed, flags that differ, metrics, epochs) a row, and what each extends."""
    settings = {"data": "demo", "weights": "w.pt", "mean_std": "imagenet", "extend": None, "seed": 0}
    made = []
    for (name, seed, change, metrics, epochs), base in zip(rows, bases or [None] * len(rows)):
        config = small(tasks={task: TASKS[task].channels for task in metrics}, **change)
        told = settings | {"seed": seed, "base": base, "model": asdict(config)}
        result = {"metrics": metrics, "constant": {"sal": 5.0, "edge": len(metrics)}, "images": 7,
                  "data": "/there/demo", "classes": {}, "file": "metrics.json", "default_baseline": "none"}
        made.append(evaluate.Row(f"runs/{name}", told, result, epochs))
    evaluate.write_study(path, made)


def test_groups_of_seeds_and_their_differences_are_those_worked_out(tmp_path, table, fails):
    def epochs(end):
        return [{"epoch": n, "shared_mass": mass, "information": 0.25, "scale": 0.5,
                 "conflict": {"LoRA": (0.3, -end)}} for n, mass in ((1, 0.4), (2, 0.2), (3, end))]

    study = tmp_path / "study.jsonl"
    study_of(study, *(("old-%d" % s, s, {}, {"sal": sal, "normals": 20.0}, epochs(0.1))
                      for s, sal in enumerate((10, 12, 17))),
             *(("new-%d" % s, s, {"rank": 3}, {"sal": sal, "normals": normals}, epochs(end)[::1 + s // 7])
               for s, sal, normals, end in
               ((2, 21.0, 20.5, 0.36), (0, 13.0, 19.5, 0.2), (7, 99.0, 1, 1.0), (1, 17.0, 20.0, 0.28))),
             ("one", 0, {"rank": 5}, {"sal": 30.0, "normals": 20.0}, []))
    told = table(study, "--baseline", "resnet18").splitlines()
    row = {}
    for line in told:
        row.setdefault(line.split("  ")[0].strip(), [word for word in line.split()[2:] if word != "–"])
    # sal: mean of 10, 12, 17 is 13, deviation √((9 + 1 + 16) / 2) = 3.61
    assert row["old ×3"][:5] == ["7/3/2/4", "13.00", "±3.61", "20.00", "±0.00"]
    # Δm of a run: 50 · ((sal − 63.2) / 63.2 − (normals − 15.4) / 15.4); that of the group is their mean
    gains = [50 * ((sal - 63.2) / 63.2 - 4.6 / 15.4) for sal in (10, 12, 17)]
    assert row["old ×3"][5:7] == [f"{sum(gains) / 3:+.2f}", f"±{np.std(gains, ddof=1) / math.sqrt(3):.2f}"]
    # seeds 0, 1, 2 alone: 13 − 10 = 3, 17 − 12 = 5, 21 − 17 = 4, so 4 ± 1/√3; normals −0.5, 0, 0.5
    pairs = next(line for line in told if "3 pairs" in line)
    assert pairs.startswith("  less old ") and told[told.index(pairs) - 1].startswith("new ×4")
    assert "+4.00 ±0.58*" in pairs and "+0.00 ±0.29 " in pairs
    assert sum(line.startswith("  less ") for line in told) == 3  # "one" has no pair
    at = next(n for n, line in enumerate(told) if "0.400" in line)
    old, _, less = (line.split() for line in told[at:at + 3])
    assert old == "old ×3 0.400 ±0.000 0.100 ±0.000 -0.300 ±0.000 0.250 ±0.000 0.500 ±0.000".split()
    zero = ["+0.000", "±0.000"]  # of the mass at the end: 0.2 − 0.1, 0.28 − 0.1 and 0.36 − 0.1
    gain = ["+0.180", "±0.046*"]
    assert less == ["less", "old", "3", "pairs", *zero, *gain, *gain, *zero, *zero]
    assert any(line.split() == "old ×3 0.300 ±0.000 -0.100 ±0.000".split() for line in told)
    each = table(study, "--each")
    assert "new-7" in each and "less" not in each and "baseline: none" in each
    only = table(study, "--only", "new,old")
    assert "  less new " in only and "\none " not in only and "'no'" in fails(
        evaluate.main, study, "--only", "no")
    table(study, "--baseline", "resnet18")
    assert drawn(tmp_path / "study.png")
    good = study.read_text().splitlines()[0]
    for text in ('{"kind": "step"}\n', "", "[]", '{"run": "a", "settings": {}}',
                 good.replace("default_baseline", "x"), good.replace("conflict", "x")):
        (tmp_path / "x.jsonl").write_text(text)
        assert "no study" in fails(evaluate.main, tmp_path / "x.jsonl")
        assert "no study" in fails(evaluate.main, study, "--record", tmp_path / "x.jsonl")
    for name in ("x.json", "nowhere/x.jsonl"):
        assert "--record" in fails(evaluate.main, study, "--record", tmp_path / name)
    assert "as they were judged" in fails(evaluate.main, study, "--tasks", "sal")


def test_the_demos_baseline_is_the_mean_of_the_studys_single_task_models(tmp_path):
    rows = [row for row in evaluate.read_study(ROOT / "assets/study.jsonl")
            if row.config.experts == 0 and len(row.config.tasks) == 1]
    for task, value in evaluate.BASELINES["demo"].items():
        found = {row.settings["seed"]: row.result["metrics"][task] for row in rows
                 if task in row.config.tasks}
        assert len(found) >= 4 and value == pytest.approx(np.mean([*found.values()]), abs=0.006)
    (tmp_path / "ImageSets/Context").mkdir(parents=True)
    for images, name in ((5105, "resnet18"), (5104, "none")):
        (tmp_path / "ImageSets/Context/val.txt").write_text("\n".join(map(str, range(images))))
        (tmp_path / "ImageSets/Context/train.txt").write_text("0")
        assert evaluate.default_baseline(tmp_path) == name
    for made, name in ((data.DEMO | {"seed": 0}, "demo"), (data.DEMO | {"seed": 1}, "none"), ({}, "none")):
        data.write_json(tmp_path / "demo.json", made)
        assert evaluate.default_baseline(tmp_path) == name


def test_rows_that_are_no_pairs_of_seeds_stay_apart(tmp_path, table):
    """Runs of one name, of unlike bases, not finished; pairs are of the base's seed, too."""
    study, seeds = tmp_path / "study.jsonl", range(2)
    metrics, ended = {"sal": 50.0}, [{"epoch": 2, "conflict": {}, "shared_mass": None, "information": None,
                                      "scale": None}]
    rows = [("a", 0, {}, {"sal": 9.0}, ended), ("a", 0, {"rank": 3}, metrics, ended)]
    rows += [(f"part-{s}", s, {"rank": 5}, metrics, ended[:1 - s]) for s in seeds]
    rows += [(f"one-{s}", s, {"topk": 1}, metrics, ended) for s in (1, 10)]
    study_of(study, *rows)
    found = evaluate.groups_of(evaluate.read_study(study), False)
    assert list(found) == ["a", "a (2)", "part-0", "part-1", "one"]
    study_of(tmp_path / "new.jsonl", ("new", 0, {"topk": 2}, metrics, ended))
    table(tmp_path / "new.jsonl", "--record", study)  # what it holds already stays
    assert len(evaluate.read_study(study)) == 7 and "a (2)" in table(study)

    bases = [{"seed": s, "mi": mi, "data": "demo", "weights": "w.pt"} for mi in (0.1, 0.2) for s in seeds]
    rows = [(f"mi{base['mi']}-{n}", 0, {}, {"sal": 10.0 * n * n}, ended) for n, base in enumerate(bases)]
    study_of(tmp_path / "extended.jsonl", *rows, bases=bases)
    where = "/a/augreg/w.safetensors", "/b/augreg/w.safetensors", "/a/mae/w.safetensors"
    found = [evaluate.identity({"data": "demo", "weights": weights}) for weights in where]
    assert found[0] == found[1] != found[2]
    told = table(tmp_path / "extended.jsonl")
    (row, *_) = evaluate.read_study(tmp_path / "extended.jsonl")  # one base at two places: one run
    moved = [row._replace(settings=row.settings | {"extend": place}) for place in ("/a/five", "/b/5")]
    assert evaluate.key_of(moved[0]) == evaluate.key_of(moved[1])
    assert [evaluate.seeds({"seed": 2, "base": base}) for base in (None, {"seed": 2}, {"seed": 3})] == [
        (2,), (2,), (2, 3)]  # a run that extends one of its own seed is a pair of any run of that seed
    five = dict.fromkeys(TASKS, 30.0)
    study_of(tmp_path / "five.jsonl", *(("x-%d" % s, s, {"rank": 3}, five, []) for s in range(2)),
             *(("y-%d" % s, s, {"rank": 5}, five | {"edge": 31.5}, []) for s in range(2)))
    assert "2 pairs  +0.00 ±0.00" in table(tmp_path / "five.jsonl")  # no gap in the row
    both = table(tmp_path / "five.jsonl", tmp_path / "extended.jsonl")  # judged on unlike images, it seems
    assert re.search(r"\nconstant +– +– +5.00 +– +–\n", both)
    # 40 − 0 and 90 − 10, pairs of the bases' seeds; two pairs are too few for a verdict
    assert "mi0.1 ×2" in told and "+60.00 ±20.00 " in told


def test_differences_are_of_what_can_be_compared(tmp_path, table):
    """Of one protocol and the same tasks; runs without a number count neither as a pair nor in a row."""
    def ended(mi, **conflict):
        return [{"epoch": 1, "conflict": conflict, "shared_mass": 0.5, "information": mi, "scale": 1.0}]

    rows = [(f"all-{s}", s, {}, {"sal": 10.0 * s, "edge": 7.0}, ended(0.5)) for s in range(4)]
    rows += [(f"sal-{s}", s, {}, {"sal": 10.0 * s + 2 + s % 2}, ended(0.2)) for s in range(4)]
    rows += [(f"few-{s}", s, {"rank": 3}, {"sal": 10.0 * s, "edge": 7.0},
              ended(0.5, **({"LoRA": (0.5, 0.1 * s)} if s else {}))) for s in range(4)]
    rows += [(f"more-{s}", s, {"rank": 5}, {"sal": 10.0 * s, "edge": 7.0},
              ended(0.5, **({"LoRA": (0.5, 0.1 * s + (0.5, 0.7, 0.6, 0.3)[s])}))) for s in range(4)]
    study_of(tmp_path / "study.jsonl", *rows)
    text = (tmp_path / "study.jsonl").read_text()
    quick = text.replace('"file": "metrics.json"', '"file": "metrics-quick.json"').replace("runs/", "runs/q")
    (tmp_path / "quick.jsonl").write_text(quick)
    told = table(tmp_path / "study.jsonl")
    first, numbers = told.split("after the last epoch: gates")
    assert re.search(r"4 pairs +– +– +\+2.50 ±0.29\* +– +– +–\n", first)  # no Δm: other tasks
    numbers, cosines = numbers.split("after the last epoch: cosines")
    assert re.search(r"sal ×4 .*\n(?!  less)", numbers) and numbers.count("  less all  4 pairs") == 2
    assert re.search(r"\nfew ×3 +0.500 ±0.000 +0.200 ±0.100\n", cosines)
    assert re.search(r"\n  less few +3 pairs +\+0.000 ±0.000 +\+0.533 ±0.120\*", cosines)  # 0.7, 0.6, 0.3
    both = table(tmp_path / "study.jsonl", tmp_path / "quick.jsonl", "--only", "all,all (2),few (2)")
    assert not re.search(r"[0-9] pairs", both) and "all ×4" in both and "all (2) ×4" in both


def test_of_two_runs_with_the_same_flags_the_one_that_trained_longer_counts(tmp_path, table, monkeypatch):
    def ended(last):
        return [{"epoch": last, "conflict": {}, "shared_mass": None, "information": None, "scale": None}]

    study = tmp_path / "study.jsonl"
    study_of(study, ("first", 0, {}, {"sal": 50.0}, ended(3)))
    (row,) = evaluate.read_study(study)
    runs = {"short": (40.0, 2), "first": (50.0, 3), "other": (60.0, 4)}
    monkeypatch.setattr(evaluate, "routers_of", lambda folder: ended(runs[folder.name][1]))
    monkeypatch.setattr(evaluate, "evaluate_run", lambda run, *_: row.result | {
        "metrics": {"sal": runs[run.folder.name][0]}})
    for name in runs:
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").touch()
        data.write_json(tmp_path / name / "config.json", row.settings)
    for name, told, kept in (("short", "short is left out: first has its flags", "first"),
                             ("first", "", "first"), ("other", "other takes the place of first", "other")):
        found = table(tmp_path / name, "--record", study)
        assert told in found and ("flags" in found) == bool(told)
        (line,) = evaluate.read_study(study)
        assert line.run == kept and line.result["metrics"] == {"sal": runs[kept][0]}


def test_a_study_keeps_what_runs_were_judged(mini, tmp_path, table):
    """The same table from the file as from the folders; the same run again replaces its line."""
    for seed in (3, 4):
        train.main(flags(mini, tmp_path / f"runs/some-{seed}", f"--epochs 1 --seed {seed} --tasks sal"))
    runs = [tmp_path / f"runs/some-{seed}" for seed in (3, 4)]
    study = tmp_path / "study.jsonl"
    first = table(*runs, "--record", study, "--baseline", *runs)
    again = table(study, *runs, "--record", study, "--baseline", "survey")
    assert "some ×2" in first and "some ×2" in again and study.read_text().count("\n") == 2
    assert str(tmp_path) not in study.read_text()
    columns = [next(line for line in text.splitlines() if " ×2" in line).split()[2:7]
               for text in (first, table(study, "--baseline", *runs))]
    assert columns[0] == columns[1]
    (row, _) = evaluate.read_study(study)
    (record,) = logged(runs[0], "epoch")
    assert row.epochs[0]["shared_mass"] == pytest.approx(np.mean(record["shared_mass"]), abs=1e-5)
    update, ffn = np.array(record["scale"]).transpose(2, 0, 1)
    assert row.epochs[0]["scale"] == pytest.approx((update / ffn).mean(), abs=1e-5) and (update > 0).all()


def test_the_epochs_of_a_long_study_can_be_read_in_its_picture(table, monkeypatch, tmp_path):
    """The early runs have 30 epochs and, on data without a baseline, no gains: one panel."""
    ticks, plot = [], evaluate.plot
    monkeypatch.setattr(evaluate, "plot", lambda *args, xticks, **more: (
        ticks.append([*xticks]), plot(*args, xticks=xticks, **more))[1])
    monkeypatch.chdir(tmp_path)
    table(ROOT / "assets/early.jsonl")
    assert ticks == [[30, 26, 22, 18, 14, 10, 6, 2]] and drawn(tmp_path / "early.png")


def test_images_with_truth_in_every_task_are_drawn_first(finished, mini, table, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "draw_predictions", lambda path, samples: seen.extend(samples))
    table(finished)
    people = [(truth["human_parts"] != IGNORE).any() for _, truth, _ in seen]
    split = data.PascalContext(mini, "val", 32)
    parts = [bool((split[i][1]["human_parts"] != IGNORE).any()) for i in range(7)]
    assert people == sorted(people, reverse=True) and len(people) == 6
    assert 0 < sum(people) == min(6, sum(parts)) < 6


@pytest.fixture
def counting(monkeypatch):
    """No image is judged, the sums are made up, nothing is drawn: a list of the numbers of images that would
    have been judged."""
    judged = []

    def judge(model, dataset, mean_std, device, protocol=evaluate.Protocol()):
        judged.append(len(dataset))
        sums = {"semseg": np.ones((21, 3), int), "human_parts": np.ones((7, 3), int),
                "sal": np.full((15, 2), 1.0), "edge": np.ones((len(protocol.levels()), 3), int),
                "normals": np.array([20.0, 1])}
        sums["semseg"][[4, 7, 20]] = 0
        return sums, sums

    monkeypatch.setattr(evaluate, "accumulate", judge)
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    return judged


def test_a_result_is_kept_for_the_code_that_computed_it(finished, tmp_path, table, monkeypatch, counting):
    for module in (evaluate, ase, data):
        table(finished)
        before = len(counting)
        assert "kept in metrics.json from" in table(finished) and len(counting) == before
        edited = tmp_path / Path(module.__file__).name
        edited.write_bytes(Path(module.__file__).read_bytes() + b"# edited\n")
        monkeypatch.setattr(module, "__file__", str(edited))
        assert "kept in metrics.json from" not in table(finished) and len(counting) == before + 1
    os.utime(finished / "checkpoint.pt")
    table(finished)
    settings_of(finished, mean_std="half")
    table(finished)
    assert len(counting) == 6


def test_each_protocol_has_a_file_of_its_own(finished, broken, tmp_path, table, counting):
    told = table(finished)
    assert "semseg: the mean over the 18 of 21 classes that occur\n" in told and "human_parts:" not in told
    before = result_of(finished / "metrics.json")
    assert before["classes"] == {"semseg": [18, 21], "human_parts": [7, 7]}
    ids = data.read_ids(broken, "val")
    (tmp_path / "half.txt").write_text("\n".join(ids[:3] + ids[:1]))
    (tmp_path / "rest").mkdir()
    (tmp_path / "rest/half.txt").write_text("\n".join(ids[3:]))
    variants = [["--quick"], ["--no-nms"], ["--thresholds", "99"],
                ["--no-nms", "--thresholds", "99", "--quick"], ["--ids", tmp_path / "half.txt"],
                ["--ids", tmp_path / "rest/half.txt"], ["--data", broken]]
    files = []
    for variant in variants:
        told = table(finished, *variant)
        files += {path.name for path in finished.glob("metrics*.json")} - {"metrics.json", *files}
        assert f"kept in {files[-1]}, which is not the full default protocol" in told
        assert f"kept in {files[-1]} from" in table(finished, *variant)
    assert len(files) == len(variants) and counting == [7, 7, 7, 7, 7, 3, 4, 7]
    assert files[:4] == ["metrics-quick.json", "metrics-no-nms.json", "metrics-thresholds-99.json",
                         "metrics-quick-no-nms-thresholds-99.json"]
    assert result_of(finished / "metrics.json") == before and "kept in metrics.json\n" in table(finished)


def test_no_protocol_replaces_anothers_pictures_and_what_is_interrupted_is_drawn_again(
        finished, table, monkeypatch):
    table(finished, "--no-nms")
    before = tree(finished)
    assert finished / "edges-no-nms.png" in before and finished / "predictions-no-nms.png" in before

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(evaluate, "draw_curves", interrupted)
        table(finished)
    assert stop.value.code == 130 and result_of(finished / "metrics.json")["metrics"]  # figures are safe
    table(finished)
    after = tree(finished)
    assert drawn(finished / "curves.png") and finished / "metrics.json" in after
    assert all(after[path] == before[path] for path in before if "no-nms" in path.name)


def test_labels_that_differ_by_256_have_an_edge(broken):
    labels((36, 48), np.where(np.arange(48) < 24, 3, 259))(data.find(broken, "labelmap", "2008_000001"))
    image, truth = evaluate.read_truth(broken, "2008_000001", ["edge"])
    assert image.shape == (3, 36, 48) and truth["edge"][:35].sum(1).tolist() == [1] * 35


def test_a_metric_without_truth_is_a_dash_and_null(finished, broken, table):
    for id in data.read_ids(broken, "val"):  # nobody is in them
        anno = struct([(id, np.zeros((1, 0), object))], "xy")
        scipy.io.savemat(broken / f"human_parts/{id}.mat", {"anno": anno})
    told = table(finished, "--data", broken, "--baseline", "survey")
    row = next(line for line in told.splitlines() if line.startswith(str(finished)) and "4/2/1/2" in line)
    assert row.split()[3] == "–" and row.split()[7] == "–"
    assert "human_parts: no truth in these images, and so no Δm" in told
    result, = (result_of(path) for path in finished.glob("metrics-data-*.json"))
    assert result["metrics"]["human_parts"] is None is result["constant"]["human_parts"]
    assert result["delta_m"] is None and result["baseline"] == "survey"


def test_a_run_is_judged_from_anywhere_and_after_a_move(
        mini, finished, tmp_path, table, fails, monkeypatch, counting):
    settings_of(finished, data=mini.name)  # as older runs have it
    monkeypatch.chdir(mini.parent)
    table(finished)
    monkeypatch.chdir(tmp_path)
    moved = finished.rename(tmp_path / "moved")
    error = fails(evaluate.main, "moved", "--device", "cpu")
    assert f"moved was trained on {mini.name}, which is not there: name it, --data DIR" in error
    assert "kept in metrics.json from" in table(moved, "--data", mini)
    copy = shutil.copytree(mini, tmp_path / "copied")
    settings_of(moved, data=str(tmp_path / "gone"))
    table(moved, "--data", copy)  # where it was is nothing: it has moved
    assert result_of(moved / "metrics.json")["data"] == str(copy) and len(counting) == 2


def test_a_result_that_is_not_whole_is_computed_again(finished, table, counting):
    table(finished)
    path = finished / "metrics.json"
    whole = path.read_bytes()
    for content in (b"", whole[:len(whole) // 2], b"\xff\xfe" + whole, b"[]", b"null", b"{}"):
        path.write_bytes(content)
        table(finished)
        assert path.read_bytes()[:100] == whole[:100] and len(result_of(path)) == len(json.loads(whole))
    assert len(counting) == 7


@pytest.mark.parametrize("record", [
    {"kind": "epoch", "step": 9, "epoch": 3, "val": {}, "gates": 5}, {"kind": "step", "step": 9, "epoch": 3},
    {"kind": "step", "step": 9, "epoch": 3, "losses": [], "lr": "fast"},
    {"kind": "epoch", "step": 9, "epoch": 3}])
def test_a_log_of_another_shape_costs_its_pictures_alone(finished, table, record):
    with open(finished / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    assert f"{finished}/log.jsonl is not as train.py writes it" in table(finished)
    assert drawn(finished / "edges.png") and (finished / "metrics.json").exists()


# Photos.


@pytest.mark.parametrize("mode, name", [
    ("RGB", "a.png"), ("RGBA", "a.png"), ("L", "a.png"), ("I;16", "a.tiff"), ("I", "a.tiff")])
def test_a_photo_of_any_kind_is_drawn(finished, tmp_path, table, monkeypatch, mode, name):
    """8 bits: taken with the camera on its side. I: 16 bits, which are scaled to 8."""
    grey, draw, seen, exif = rng.integers(0, 65536, (31, 53)), evaluate.draw_predictions, [], Image.Exif()
    if name == "a.tiff":
        Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32}[mode])).save(tmp_path / name)
    else:
        exif[274] = 6
        Image.fromarray(np.uint8(grey // 257)).convert(mode).save(tmp_path / name, exif=exif)
        grey = np.rot90(grey, -1)
    monkeypatch.setattr(evaluate, "draw_predictions", lambda *argv: (seen.append(argv[1][0][0]), draw(*argv)))
    table(finished, tmp_path / name)
    assert (abs(seen[0] - grey[..., None] / 257) <= 1).all() and drawn(finished / "a.png")


def test_no_photo_is_replaced_by_a_prediction_nor_a_prediction_by_another(finished, tmp_path, fails):
    photos = [finished / "me.png", *(tmp_path / name for name in ("edges.png", "b.png", "a.png", "a.jpg"))]
    for path in (finished / "edges.png", *photos):
        Image.new("RGB", (32, 32)).save(path)
    before = tree(finished)
    for photo in photos[:2]:
        assert "rename" in fails(evaluate.main, finished, photo, "--device", "cpu")
    error = fails(evaluate.main, finished, *photos[2:])
    assert f"{tmp_path}/a.png and {tmp_path}/a.jpg would be drawn into one picture" in error
    assert tree(finished) == before


# Faults: what a person gets wrong is one line and exit code 2.


@pytest.mark.parametrize("wrong, told", [
    ("--topk 9", "topk must be 1 to 3"), ("--shared 4", "shared must be at most 3"), ("--rank 0", "rank"),
    ("--topk 0", "topk"), ("--tasks semseg,depth", "depth"), ("--tasks sal,sal", "twice"),
    ("--gating soft", "joint"), ("--backbone vit_huge", "vit_base"),
    ("--lr nan", "a number from 1e-09"), ("--lr -1", "a number from 1e-09"),
    ("--epochs 0", "number from 1 to"), ("--batch x", "whole number"), ("--batch 99", "13 training images"),
    ("--seed 9999999999", "number from 0 to"), ("--mi -1", "number from 0 to"),
    ("--size 44", "multiple of the patch"), ("--weights no.pt", "no weights file"),
    ("--device tpu9", "device"), ("--what", "--what"), ("--data nowhere", "nowhere"),
    ("--mean-std x", "imagenet")])
def test_bad_flags_of_train(mini, tmp_path, fails, wrong, told):
    assert told in fails(train.main, *flags(mini, tmp_path / "run", wrong))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split, content, told", [
    ("val", None, "val.txt"), ("train", b"", "empty"), ("train", b"../x\n", "../x"),
    ("train", b"/etc/x\n", "/etc/x"), ("train", b"a\na\n", "twice"), ("train", b"\xff\xfe", "cannot read"),
    ("val", b"2008_000001", "in both")])
def test_broken_lists_are_named_by_train(broken, tmp_path, fails, split, content, told):
    path = broken / f"ImageSets/Context/{split}.txt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert told in fails(train.main, *flags(broken, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_folders_that_are_not_what_they_should_be(mini, broken, tmp_path, fails):
    (tmp_path / "file").write_text("x")
    for root, out, told in ((mini.parent, "run", f"did you mean {mini}?"),
                            (tmp_path / "file", "run", "is a file"),
                            (mini, "file", "File exists"), (mini, "file/run", "Not a directory")):
        assert told in fails(train.main, *flags(root, tmp_path / out))
    (broken / "demo.json").unlink()
    assert "--weights none" in fails(train.main, "--data", broken, "--out", tmp_path / "run")
    assert "no data folder" in fails(data.main, tmp_path / "nowhere")
    assert "exists" in fails(data.main, mini, "--make", 3, 3)
    assert "--make" in fails(data.main, tmp_path / "new", "--make", 0, 3)
    assert "add --make" in fails(data.main, mini, "--seed", 3)
    assert not (tmp_path / "new").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def picture(size, value, mode="L"):
    return lambda path: Image.new(mode, size, value).save(path)


def labels(shape, value):
    return lambda path: scipy.io.savemat(path, {"LabelMap": np.full(shape, value)})


@pytest.mark.parametrize("name, harm, fault", [
    ("image", Path.unlink, "missing"), ("image", cut, "unreadable"), ("human_parts", Path.unlink, "missing"),
    ("human_parts", cut, "unreadable"), ("human_parts", lambda path: path.write_text("anno"), "unreadable"),
    ("human_parts", labels((36, 48), 1), "unreadable"), ("labelmap", Path.unlink, "missing"),
    ("labelmap", lambda path: path.write_bytes(b""), "unreadable"), ("labelmap", labels((48, 36), 1), "size"),
    *(("labelmap", labels((36, 48), value), "range") for value in (460, -1, -1.0, 1j, math.nan, 2.5)),
    ("semseg", picture((48, 36), 21), "range"), ("semseg", picture((47, 36), 1), "size"),
    ("semseg", picture((48, 36), (0, 0, 128), "RGB"), "range"), ("normals", cut, "unreadable"),
    ("sal", Path.unlink, "missing")])
def test_a_broken_file_is_named_by_the_check_and_by_train(broken, tmp_path, check, fails, name, harm, fault):
    path = data.find(broken, name, "2008_000001")
    harm(path)
    code, report = check()
    assert code == 1 and f"{name}, {fault}: 2008_000001" in report
    spoilt = {"image": set(TASKS), "labelmap": {"edge", "normals"}}.get(name, {name})
    rest = ",".join(task for task in TASKS if task not in spoilt)
    assert (f"with --tasks {rest}:" if rest else "a training could not start") in report
    error = fails(train.main, *flags(broken, tmp_path / "run"))
    assert str(path) in error and not (tmp_path / "run/log.jsonl").exists()


def test_a_copy_without_normals_and_saliency_serves_the_other_tasks(broken, tmp_path, check, table, fails):
    """The check says which; they are cached, trained and judged without the files of the rest, and nothing
    is written into the data set."""
    shutil.rmtree(broken / "normals_distill")
    shutil.rmtree(broken / "sal_distill")
    before, (code, report) = tree(broken), check()
    assert code == 1 and "could start with --tasks semseg,human_parts,edge:" in report
    assert drawn(Path("contact_broken.png"))
    assert "missing" in fails(train.main, *flags(broken, tmp_path / "all"))
    train.main(flags(broken, tmp_path / "run", "--tasks semseg,human_parts,edge --epochs 1"))
    table(tmp_path / "run")
    assert list(result_of(tmp_path / "run/metrics.json")["metrics"]) == ["semseg", "human_parts", "edge"]
    assert tree(broken) == before


def test_a_run_folder_that_is_not_whole(finished, tmp_path, table, fails, counting):
    """Beside others it is left out of the table, and named."""
    early, empty = tmp_path / "early", tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(finished, early)
    cut(early / "checkpoint.pt")
    assert "cannot read" in fails(evaluate.main, early)
    (early / "checkpoint.pt").unlink()
    assert "no checkpoint" in fails(evaluate.main, early)
    assert f"left out, without a checkpoint yet: {early}, {empty}\n" in table(early, finished, empty)
    cut(early / "config.json")
    assert "broken" in fails(evaluate.main, early)
    for folders in [empty], [tmp_path / "typo"], [tmp_path / "typo", finished]:
        assert "no run folder" in fails(evaluate.main, *folders)


def test_bad_input_of_evaluate(finished, tmp_path, fails, counting):
    def told(*argv):
        return fails(evaluate.main, finished, *argv, "--device", "cpu")

    (tmp_path / "photo.jpg").write_text("no photo")
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "floats.tiff")
    (tmp_path / "ids.txt").write_text("2010_999999")
    alone = "is no run folder; expected those, or one of resnet18, survey, demo, alone"
    assert f"resnet99 {alone}" in told("--baseline", "resnet99")
    assert f"--baseline resnet18 survey: resnet18 {alone}" in told("--baseline", "resnet18", "survey")
    assert not counting  # before hours of judging
    assert "no device meta here" in fails(evaluate.main, finished, "--device", "meta")
    assert "no data folder" in told("--data", tmp_path / "none")
    assert "expected a photo" in told(tmp_path / "photo.jpg")
    assert "floats.tiff holds float32 numbers" in told(tmp_path / "floats.tiff")
    assert "2010_999999" in told("--ids", tmp_path / "ids.txt")
    for content in ({}, {"model": {}, "epoch": 1}, [1], 5, {"model": 5, "optimizer": 1, "epoch": 1}):
        torch.save(content, finished / "checkpoint.pt")
        assert "checkpoint.pt" in told()
    settings = settings_of(finished)
    changes = [{"mean_std": "x"}, {"mean_std": []}, {"data": 5}, {"model": []}]
    changes += [{"model": settings["model"] | {"tasks": tasks}} for tasks in ({"depth": 1}, {"sal": 3})]
    other = [json.dumps(settings | change).encode() for change in changes]
    for content in (b"[]", b"\xff\xfe", b"5", *other):
        (finished / "config.json").write_bytes(content)
        assert "broken, or made by other code" in told()


@pytest.mark.parametrize("error, told", [
    (BrokenProcessPool(), "a worker process was killed"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch"), (MemoryError(), "--checkpointing"),
    (OSError(28, "No space left on device", "run/x"), "run/x: No space left"),
    (data.UserError("a\nb"), "a b")])
def test_what_a_command_meets_ends_in_one_line(fails, error, told):
    def job(args):
        raise error

    assert told in fails(lambda argv: data.command(argparse.ArgumentParser(), job, argv))


def test_letters_that_an_encoding_lacks_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    data.command(argparse.ArgumentParser(), lambda args: print("Δm ↑ 1 °"), [])
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"?m ? 1 ?\n"


def test_a_command_leaves_signals_as_they_were_and_tells_hours():
    before, seen = signal.signal(signal.SIGINT, signal.default_int_handler), []
    data.command(argparse.ArgumentParser(), lambda args: seen.append(signal.getsignal(signal.SIGINT)), [])
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler is not seen[0]
    assert data.duration(90061.4) == "25:01:01" and data.duration(59) == "0:00:59"


# Ctrl-C, kills, locks, disks.


@pytest.mark.parametrize("where, sent", [("object", signal.SIGINT), ("workers", signal.SIGINT),
                                         ("workers", signal.SIGKILL)])
def test_workers_end_and_ctrl_c_is_heard(where, sent):
    """While 60 jobs of 0.3 s are queued, or within a destructor, which drops what is raised there. Until the
    last worker has ended the output stays open."""
    script = ("import argparse, sys, time, data\n"
              "class Drops:\n"
              "    def __del__(self):\n"
              "        print('now', flush=True)\n"
              "        time.sleep(1)\n"
              "def job(args):\n"
              "    if sys.argv[1] == 'object':\n"
              "        Drops()\n"
              "        time.sleep(60)\n"
              "    for _ in data.parallel(time.sleep, 60 * [0.3], 'sleep'):\n"
              "        print('now', flush=True)\n"
              "if __name__ == '__main__':\n"
              "    data.command(argparse.ArgumentParser(), job, [])\n")
    process = subprocess.Popen([sys.executable, "-c", script, where], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,  # a job in the background ignores Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    process.stdout.readline()
    process.send_signal(sent)
    began = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - began < 4
    if sent == signal.SIGINT:
        assert process.returncode == 130 and error.strip().splitlines()[-1].startswith("interrupted")


def test_every_ctrl_c_is_heard(mini, trained, tmp_path, capsys):
    """Twenty trainings of one run, each interrupted a little later, wherever it is then. (The training of
    `trained` has imported what torch imports late: a module that is half imported fails in this process.)"""
    for n in range(20):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # after the first one no more are heard
        sent = []

        def interrupt():
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Timer(0.05 + 0.02 * n, interrupt).start()
        with pytest.raises(SystemExit) as stop:
            train.main(flags(mini, tmp_path / "run", "--epochs 9999"))
        assert stop.value.code == 130 and time.monotonic() - sent[0] < 2
        assert capsys.readouterr().err == "\ninterrupted; the same command goes on or starts again\n"
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_two_trainings_do_not_write_into_one_folder(mini, tmp_path, fails):
    with train.locked(tmp_path / "run"):
        assert "another training is writing" in fails(train.main, *flags(mini, tmp_path / "run"))
    assert not (tmp_path / "run/log.jsonl").exists()
    train.main(flags(mini, tmp_path / "run", "--epochs 1"))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(data.UserError, match="cannot write .*x.pt .*make room"):
        data.write_atomically(tmp_path / "x.pt", lambda file: (file.write(b"half"), torch.zeros(2).view(3)))
    assert not list(tmp_path.iterdir())
    for name in (".x.pt.999999999.tmp", f".x.pt.{os.getppid()}.tmp", ".x.pt.tmp"):
        (tmp_path / name).write_text("")
    data.remove_leavings(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".x.pt.{os.getppid()}.tmp", ".x.pt.tmp"]


# ------------------------------------------------------------------------------ README's three worked changes


def changed(tmp_path, number, code):
    """Run `code` with the modules changed by README's diff of this number: each hunk's old lines occur once.

    Returns the metrics of the run in "run", where the code judges one.
    """
    for name in ("ase", "data", "evaluate", "train"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    diff = (ROOT / "README.md").read_text(encoding="utf-8").split("```diff\n")[1 + number].split("```")[0]
    for part in diff.split("--- ")[1:]:
        name, _, hunks = part.partition("\n")
        text = (tmp_path / name).read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines()
            old, new = ("".join(line[1:] + "\n" for line in lines if line[0] != sign) for sign in "+-")
            assert text.count(old) == 1, f"{name} has {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
    start = ("import torch, ase, data, evaluate, train\nfrom concurrent.futures import ThreadPoolExecutor\n"
             "data.workers = lambda: ThreadPoolExecutor(2)\n")
    subprocess.run([sys.executable, "-c", start + code], check=True, cwd=tmp_path,
                   env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL)
    if "evaluate.main" in code:
        assert drawn(tmp_path / "run/predictions.png")
        return result_of(tmp_path / "run/metrics.json")["metrics"]


def judged(root, more=""):
    """The code of a short run that is judged."""
    argv = flags(root, "run", "--epochs 1 " + more)
    return f"train.main({argv})\nevaluate.main(['run', '--device', 'cpu'])\n"


def test_readmes_gate_opens_as_many_experts_as_hold_half_of_the_probability(mini, tmp_path):
    changed(tmp_path, 0, f"train.main({flags(mini, 'run', '--epochs 1 --gating topp --tasks sal')})\n"
            "logits = torch.tensor([[9.0, 5.0, 1.0, 2.0, 0.0], [9.0, 1.0, 1.0, 1.0, 1.0]])\n"
            "gates = ase.gate(logits, 1, 1, 'topp')\n"
            "assert (gates > 0).sum(-1).tolist() == [2, 3], gates\n"
            "torch.testing.assert_close(gates.sum(-1), torch.ones(2))\n")


def test_readmes_sixth_task_is_learned_and_judged(tmp_path):
    metrics = changed(tmp_path, 1, "data.make_demo('deep', 5, 3, 48)\n"
                      f"train.main({flags('deep', 'base', '--epochs 1 --tasks sal,edge')})\n"
                      + judged("deep", "--extend base --tasks depth"))
    assert set(metrics) == {"sal", "edge", "depth"}
    shutil.rmtree(tmp_path / "run")
    metrics = changed(tmp_path, 1, judged("deep"))
    assert set(metrics) == {*TASKS, "depth"} and 0 < metrics["depth"] < 20
    depth = data.scene(0, 36, 48)["depth"]
    written = np.asarray(Image.open(tmp_path / "deep/depth/2008_000001.png"))
    assert (depth < 25).any() and abs(written / 10 - depth)[depth < 25].max() <= 0.0501


def test_readmes_other_data_set_with_three_tasks(mini, tmp_path):
    root = tmp_path / "nyud"
    for folder in ("gt_sets", "images", "normals", "segmentation"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copy(mini / f"ImageSets/Context/{split}.txt", root / f"gt_sets/{split}.txt")
        for id in data.read_ids(mini, split):
            shutil.copy(data.find(mini, "image", id), root / "images")
            shutil.copy(data.find(mini, "normals", id), root / "normals")
            classes = np.array(Image.open(data.find(mini, "semseg", id)))
            classes = np.where(classes == IGNORE, 0, classes + 1).astype(np.uint8)
            Image.fromarray(classes).save(root / f"segmentation/{id}.png")
    metrics = changed(tmp_path, 2, judged(root, "--backbone vit_tiny --tasks semseg,edge,normals"))
    assert set(metrics) == {"semseg", "edge", "normals"}


def test_readmes_layer_of_another_transformer_learns_two_tasks_on_text(tmp_path, monkeypatch):
    """Of each letter in a text: is it the text's first one; how often did it occur before, up to 3 times?"""
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[2].split("```")[0]
    (tmp_path / "text_layer.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from text_layer import Layer
    assert len(code.splitlines()) <= 15
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(2))
    embed, position = nn.Embedding(5, 64), nn.Parameter(0.3 * torch.randn(11, 64))
    heads = nn.ModuleList([nn.Linear(64, 2), nn.Linear(64, 4)])
    parameters = [*layers.parameters(), *embed.parameters(), position, *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    history = []
    for step in range(120):
        text = torch.randint(5, (32, 11))
        equal = text[:, :, None] == text[:, None]                                        # (B, L, L)
        targets = equal[:, 0].long(), equal.tril(-1).sum(-1).clamp(max=3)
        x = (embed(text) + position).expand(2, -1, -1, -1)
        for layer in layers:
            x, gates = layer(x)
        losses = [F.cross_entropy(head(y).mT, target) for head, y, target in zip(heads, x, targets)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append([loss.item() for loss in losses])
    first, last = np.mean(history[:10], 0), np.mean(history[-10:], 0)
    assert (last < 0.5 * first).all(), (first, last)
    assert gates.shape == (2, 8) and torch.allclose(gates.sum(1), torch.ones(2))
    assert set(layers[0].experts.router) == {"first", "count"}
    assert all(p.grad.abs().sum() > 0 for p in layers[0].experts.parameters())


# ---------------------------------------------------------------------------------------- python test_ase.py


class OneLoRA(nn.Module):
    """The yardstick: one LoRA beside the FFN, as wide as all experts together, always on, no router."""

    def __init__(self, *, dim, experts, rank, **_):
        super().__init__()
        self.down = nn.Parameter(0.02 * torch.randn(experts * rank, dim))
        self.up = nn.Parameter(0.02 * torch.randn(experts * rank, dim))

    def forward(self, x):
        nothing = x.new_zeros(len(x), 0)
        return x @ self.down.T @ self.up, nothing, nothing


class Loop(ase.LoRAExperts):
    """Sparse dispatch as it is usually written: one expert after another, on the tokens that selected it."""

    def mix(self, x, gates):
        tokens, gates = x.flatten(0, 1), gates.flatten(0, 1).to(x.dtype)
        y = torch.zeros_like(tokens)
        for i, (down, up) in enumerate(zip(self.down, self.up)):
            at = gates[:, i].nonzero()[:, 0]
            y.index_add_(0, at, tokens[at] @ down.T @ up * gates[at, i, None])
        return y.view_as(x)


@both_gatings
def test_sparse_dispatch_computes_what_the_fused_experts_do(gating):
    config, x, results = small(gating=gating), random(2, 3, 5, 18), []
    for layer in (randomise(experts_of(config)), randomise(experts_of(config, Loop))):
        update = layer(x)[0]
        (update * random(*x.shape)).sum().backward()
        results.append((update, layer.down.grad, layer.up.grad, *(p.grad for p in layer.router.values())))
    torch.testing.assert_close(*results)


def bench(rounds=7, image=224, width=768, depth=12, **shape):
    """Time the expert layer and ViT-base with it for one image and five tasks, each beside its alternatives,
    in turn. Prints a table: the first row's milliseconds, the others' time relative to it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    print(f"ViT-base, one image, five tasks; {machine}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}\nfirst row: time; others: relative to it, medians of {rounds} rounds, ± half "
          "the distance of the quartiles\n")
    images = torch.randn(1, 3, image, image, device=device)
    x = torch.randn(5, 1, 1 + (image // 16) ** 2, width, device=device, requires_grad=True)

    def backward(y):
        sum(map(torch.sum, y.values() if isinstance(y, dict) else y[:1])).backward()

    def jobs(layer, experts, topk, shared, rank):
        """{column: function} of a model whose blocks have this layer; the whole model at N = 32 alone."""
        config = ase.Config(image=image, dim=width, depth=depth if experts == 32 else 1, experts=experts,
                            topk=topk, shared=shared, rank=rank, **shape)
        model = ase.ASE(config)
        for block in model.blocks:
            block.experts = layer and experts_of(config, layer)
        model.to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        block = model.blocks[0]
        found = {"block": lambda: backward(block(x))}
        if layer:
            found |= {"layer, forward": torch.no_grad()(lambda: block.experts(x)),
                      "layer": lambda: backward(block.experts(x))}
        if experts == 32:
            found |= {"features": lambda: backward(model.features(images)),
                      "step": lambda: (backward(model(images)[0]), optimizer.step(), optimizer.zero_grad())}
        return found

    rows = {"one LoRA of rank 64": (OneLoRA, 32, 6, 2, 2), "no experts": (None, 32, 6, 2, 2)}
    rows |= {"fused ({}/{}/{}/{})".format(*n): (ase.LoRAExperts, *n) for n in (
        (16, 3, 1, 4), (32, 6, 2, 2), (64, 12, 4, 1), (256, 48, 16, 1))}
    rows |= {"loop (32/6/2/2)": (Loop, 32, 6, 2, 2)}
    built = {name: jobs(*row) for name, row in rows.items()}
    columns = ("layer, forward", "layer", "block", "features", "step")
    table = {name: [] for name in rows}
    for column in columns:
        times = {name: [] for name in rows if column in built[name]}
        for n in range(rounds + 1):
            for name in times:
                start = time.perf_counter()
                built[name][column]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name] += [time.perf_counter() - start] if n else []  # the first round warms up
        first = np.array(next(iter(times.values())))
        for name in rows:
            low, median, high = np.percentile(np.divide(times.get(name, np.nan), first), (25, 50, 75))
            cell = f"{median:.2f} ±{(high - low) / 2:.2f}" if name in times else "–"
            table[name].append(f"{1e3 * np.median(first):.1f} ms" if name == next(iter(times)) else cell)
    print(f"{'(N/k/S/r), fwd+bwd':24}" + "".join(f"{column:>17}" for column in columns))
    for name, cells in table.items():
        print(f"{name:24}" + "".join(f"{cell:>17}" for cell in cells))


def test_the_bench_times_every_row(capsys):
    bench(rounds=1, image=16, width=12, depth=1, heads=2, head_dim=4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[4:]]
    assert len(rows) == 7 and rows[0].count("ms") == 5
    assert [sum("±" in cell for cell in row) for row in rows] == [0, 3, 3, 5, 3, 3, 5]


if __name__ == "__main__":
    bench()
