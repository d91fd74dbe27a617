"""All tests, by independent routes and on tiny sizes. `pytest test_ase.py`: under three minutes."""

import argparse
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import FrozenInstanceError
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
import scipy.stats
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
from assets import demo, study
from data import IGNORE, PALETTE, TASKS, Task, boundaries, paint, thin
from evaluate import THRESHOLDS, draw_curves, draw_experts
from evaluate import edge_counts, ods_f, suppress, thin_words, threshold_bits

rng = np.random.default_rng(0)
ROOT = Path(__file__).parent

# ------------------------------------------------------------------------------------------------ the model

# T = 2, L = 5 tokens, D = 18, N = 7, S = 2, K = 3, R = 4; B is 3. Equalities are claimed in float64.
SMALL = dict(image=8, patch=4, dim=18, depth=2, heads=3, tasks={"semseg": 5, "edge": 1}, experts=7, topk=3,
             shared=2, rank=4, head_dim=8)
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
@pytest.mark.parametrize("experts, topk, shared", [(7, 3, 0), (7, 1, 1), (7, 3, 2), (3, 1, 2), (5, 5, 0)])
def test_gates_are_the_equations_and_exactly_k_open_also_where_logits_tie(experts, topk, shared, gating):
    z = 2 * random(3, 11, experts)
    expected = [[gates_by_hand(token, shared, topk, gating) for token in row] for row in z.tolist()]
    np.testing.assert_allclose(ase.gate(z, shared, topk, gating).numpy(), expected, rtol=0, atol=1e-13)
    for ties in (torch.zeros(13, experts), random(13, experts).round()):
        gates = ase.gate(ties, shared, topk, gating)
        assert (gates[:, shared:] > 0).sum(1).tolist() == [topk] * 13
        assert (gates[:, :shared] > 0).all()


@both_gatings
def test_gates_are_computed_in_float32_and_survive_huge_logits(gating):
    z = (3 * random(101, 7)).bfloat16()
    expected = ase.gate(z.double(), 2, 3, gating)
    torch.testing.assert_close(ase.gate(z, 2, 3, gating), expected.float(), rtol=1e-5, atol=1e-6)
    huge = ase.gate(torch.tensor([1e4, -1e4, 2e4, 0]), 1, 2, gating)
    assert huge.tolist() == [0 if gating == "joint" else 1, 0, 1, 0]


def test_the_defaults_are_the_papers():
    c = ase.Config()
    assert (c.experts, c.topk, c.shared, c.rank, c.gating, c.lora) == (16, 3, 1, 4, "joint", 4)
    assert (c.image, c.patch, c.dim, c.depth, c.heads, c.head_dim) == (224, 16, 768, 12, 12, 256)
    assert len(c.tasks) == 5 and sum(c.tasks.values()) == 33
    plain = dict(experts=0, topk=99, shared=-1, rank=None)  # the last three do not matter then
    assert [ase.Config(**x).lora for x in (plain, plain | dict(lora=2), dict(lora=0))] == [0, 2, 0]
    with pytest.raises(FrozenInstanceError):
        c.topk = 5
    c.tasks.clear()
    assert len(ase.Config().tasks) == 5  # no two share their default


@pytest.mark.parametrize("topk, shared, gating", [
    (16, 0, "joint"), (3, 13, "fixed"), (0, 1, "joint"), (1, 15, "fixed"), (3, -1, "joint"), (3, 1, "soft")])
def test_experts_that_do_not_go_together_are_one_line_wherever_they_are_asked_for(topk, shared, gating):
    flags = dict(topk=topk, shared=shared, gating=gating)
    for make in (lambda: small(experts=15, **flags), lambda: ase.gate(torch.zeros(3, 15), **flags),
                 lambda: ase.LoRAExperts(dim=5, tasks=2, experts=15, rank=1, **flags)):
        with pytest.raises(ValueError, match="^[^\n]*expected[^\n]*$"):
            make()


@pytest.mark.parametrize("change, told", [
    (dict(topk=16), "1 to 15"), (dict(shared=16), "16 of 16 experts shared: expected 0 to 15"),
    (dict(experts=-1), "experts"), (dict(rank=0), "rank"), (dict(lora=-1), "lora"), (dict(depth=0), "depth"),
    (dict(head_dim=0), "head_dim"), (dict(image=0), "image"), (dict(image=225), "multiple of the patch, 16"),
    (dict(patch=1), "patch"), (dict(heads=5), "5 heads"),
    (dict(experts=2.5), "2.5"), (dict(topk=True), "True"), (dict(dim="768"), "'768'"),
    (dict(tasks={}), "task"), (dict(tasks={"edge": 0}), "edge"), (dict(tasks={"edge": 1.5}), "1.5"),
    (dict(tasks={"a.b": 1}), "a.b"), (dict(noise=-0.5), "-0.5"), (dict(noise=math.nan), "nan")])
def test_a_bad_configuration_is_one_line_with_its_rule(change, told):
    with pytest.raises(ValueError, match=f"^[^\n]*{told}[^\n]*$"):
        ase.Config(**change)


@both_gatings
@pytest.mark.parametrize("experts, topk, shared, rank", [(7, 3, 2, 4), (5, 2, 0, 1), (3, 1, 2, 2)])
def test_fused_experts_are_the_loop_and_their_sum_written_out(experts, topk, shared, rank, gating):
    """Output and gradients are the loop's, output and routing those of Σ g_i B_i A_i x with gates by hand;
    routing is a mean over B·L tokens, shared first, probs before top-k."""
    layer = randomise(experts_of(small(experts=experts, topk=topk, shared=shared, rank=rank, gating=gating)))
    x = random(2, 3, 5, 18).requires_grad_()
    fused, probs, gates = layer(x)
    loop = layer.reference(x)
    torch.testing.assert_close(fused, loop, rtol=1e-10, atol=1e-11)
    of = [x, *layer.router.values(), layer.down, layer.up]
    weight = random(*x.shape, seed=2)
    expected = torch.autograd.grad((loop * weight).sum(), of)
    for found, gradient in zip(torch.autograd.grad((fused * weight).sum(), of), expected):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-9)
    for t, router in enumerate((layer.router.semseg, layer.router.edge)):
        tokens = x[t].flatten(0, 1)
        z = tokens @ router
        g = torch.tensor([gates_by_hand(token, shared, topk, gating) for token in z.tolist()], dtype=x.dtype)
        update = sum(g[:, i:i + 1] * (tokens @ layer.down[i].T @ layer.up[i]) for i in range(experts))
        torch.testing.assert_close(fused[t].flatten(0, 1), update, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gates[t], g.mean(0))
        torch.testing.assert_close(probs[t], z[:, shared:].softmax(1).mean(0))


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
    expected = [y.flatten(0, 1) @ p for y, p in zip(x, layer.router.values())]
    torch.testing.assert_close([*layer.logits(x)], expected)
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


def torch_block(block):
    """PyTorch's own encoder layer with the weights of ours, LoRA merged: W + B A."""
    theirs = nn.TransformerEncoderLayer(18, 3, 72, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    linears = {"self_attn.in_proj_": block.attn.qkv, "self_attn.out_proj.": block.attn.proj,
               "linear1.": block.mlp.fc1, "linear2.": block.mlp.fc2}
    state = under("norm1.", block.norm1.state_dict()) | under("norm2.", block.norm2.state_dict())
    for name, ours in linears.items():
        state |= {name + "weight": ours.weight + ours.lora_up @ ours.lora_down, name + "bias": ours.bias}
    theirs.double().load_state_dict(state)
    return theirs  # in training mode, off its fused path


def test_the_plain_vit_from_the_patches_to_the_final_norm():
    """Patches cut by slicing, the class token first, PyTorch's encoder layers and its norm. All is small, so
    that LayerNorm's eps shows: 1e-5 in place of 1e-6 is off by 1e-2."""
    model = randomise(ase.ASE(small(experts=0, lora=4)))
    images = random(3, 3, 8, 8)
    for p in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token, model.pos_embed):
        p.data *= 0.01
    cut = torch.stack([images[:, :, i:i + 4, j:j + 4].flatten(1) for i in (0, 4) for j in (0, 4)], 1)
    patches = cut @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias
    x = torch.cat([model.cls_token.expand(3, 1, 18), patches], 1) + model.pos_embed
    for block in model.blocks:
        x = torch_block(block)(x)
    expected = F.layer_norm(x, (18,), model.norm.weight, model.norm.bias, 1e-6)
    torch.testing.assert_close(model.features(images)[0], expected[None], rtol=1e-8, atol=1e-8)


def test_a_block_adds_its_experts_to_the_ffn():
    """Eq. 10 with the loop: the experts see what the FFN sees."""
    block = randomise(ase.Block(small()))
    x = random(2, 3, 5, 18)
    y = x + block.attn(block.norm1(x))
    ffn, update = block.mlp(block.norm2(y)), block.experts.reference(block.norm2(y))
    torch.testing.assert_close(block(x)[0], y + ffn + update, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patch", [2, 4, 16])
def test_heads_are_as_large_as_the_image(patch):
    head = ase.Head(small(image=3 * patch, patch=patch), 5)
    assert head(torch.randn(2, 10, 18)).shape == (2, 5, 3 * patch, 3 * patch)
    assert sum(getattr(m, "kernel_size", 0) == (3, 3) for m in head.layers) == math.log2(patch)


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


@pytest.mark.parametrize("change", [dict(), dict(lora=0)])
def test_what_a_reader_adds_is_trained_counted_and_not_asked_of_a_file(change, tmp_path, monkeypatch):
    def with_adapter(config, block=ase.Block):
        block = block(config)
        block.adapter = nn.Linear(18, 18)
        return block

    plain = ase.ASE(small(**change))
    write(tmp_path / "weights", backbone_of(small()))
    monkeypatch.setattr(ase, "Block", with_adapter)
    model = ase.ASE(small(**change))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == (set() if change else vit_names(2))
    added = 2 * (18 * 18 + 18)
    assert ase.count(model) == ase.count(plain) | {"others": (added, added)}
    assert f"{len(vit_names(2))} tensors loaded" in ase.load_backbone(model, tmp_path / "weights")


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


def test_shapes_and_that_each_task_has_its_own_tokens_and_head():
    """T = 2, B = 3, L = 5, seven blocks, D = 17, N = 13, N − S = 11; without experts one pass for all."""
    images = random(3, 3, 8, 8)
    for experts, passes, sizes in ((13, 2, ((7, 2, 11), (7, 2, 13))), (0, 1, ((0, 2, 0), (0, 2, 0)))):
        model = randomise(ase.ASE(small(depth=7, dim=17, heads=1, experts=experts)))
        tokens, routing = model.features(images)
        predictions, _ = model(images)
        assert tokens.shape == (passes, 3, 5, 17) and (routing.probs.shape, routing.gates.shape) == sizes
        assert list(predictions) == ["semseg", "edge"] and predictions["semseg"].shape == (3, 5, 8, 8)
        torch.testing.assert_close(predictions["semseg"], model.heads["semseg"](tokens[0]))
        torch.testing.assert_close(predictions["edge"], model.heads["edge"](tokens[-1]))
    assert ase.mutual_information(routing.probs).shape == (0,)


def test_mutual_information_is_its_definition_and_has_its_extremes():
    """Zero when tasks route alike, log T when no two share an expert."""
    probs = random(3, 5, 7).softmax(-1)
    for p, found in zip(probs.numpy(), ase.mutual_information(probs), strict=True):
        expected = sum(p[t, i] / 5 * np.log(p[t, i] / p[:, i].mean()) for t in range(5) for i in range(7))
        assert found.item() == pytest.approx(expected, rel=1e-10)
    assert ase.mutual_information(probs[:, :1].expand(3, 5, 7)).abs().max() < 1e-12
    assert ase.mutual_information(torch.eye(5, 7)[None]).item() == pytest.approx(math.log(5), rel=1e-5)


@pytest.mark.parametrize("change", [dict(), dict(gating="fixed"), dict(experts=0, lora=2)])
def test_checkpointing_computes_twice_compiling_makes_one_graph_and_neither_changes_anything(change):
    results, calls = [], []
    for kind in ("plain", "checkpointing", "compiled"):
        model = randomise(ase.ASE(small(**change))).train()
        model.checkpointing = kind == "checkpointing"
        network = model
        if kind == "compiled":
            network = torch.compile(model, backend="eager", fullgraph=True)  # raises at a graph break
        else:
            model.blocks[0].mlp.register_forward_pre_hook(lambda *_, kind=kind: calls.append(kind))
        torch.manual_seed(3)  # the same router noise
        predictions, routing = network(random(3, 3, 8, 8))
        sum(p.square().mean() for p in [*predictions.values(), *routing]).backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([*predictions.values(), *routing, *gradients])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-10, atol=1e-12)
    assert calls == ["plain", "checkpointing", "checkpointing"]


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
    canvas = next(data.PascalContext(mini, "train", 32).canvases([[0, 1, 2]], torch.device("cpu")))
    warps = data.random_warps(3, torch.Generator().manual_seed(0))
    for question in (lambda: canvas[0].any().item(), lambda: canvas[0][canvas[0] > 3]):
        with pytest.raises(AssertionError, match="waits"), NoQuestions():
            question()
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
        z, routing = model.blocks[0].experts.logits(x), model.features(torch.randn(3, 3, 8, 8))[1]
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
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([x.cpu() for x in (*predictions.values(), *routing, *gradients)])
    assert len(results[0]) > 30
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------------------------------- pretrained weights

def backbone_of(config):
    """The ViT of a random model, as a file of pretrained weights holds it: no LoRA, no experts, no heads."""
    model = randomise(ase.ASE(config)).float()
    return {name: p.data for name, p in model.named_parameters() if name in vit_names(config.depth)}


HUGGING_FACE = {  # timm's names, qkv apart → those of transformers' ViTModel
    "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "norm.": "layernorm."}
SAVED = HUGGING_FACE | {  # as its save_pretrained writes them
    "blocks.": "encoder.layer.", "attn.q.": "attention.attention.query.",
    "attn.k.": "attention.attention.key.", "attn.v.": "attention.attention.value.",
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
IN_MEMORY = HUGGING_FACE | {  # as version 5 has them in memory
    "blocks.": "layers.", "attn.q.": "attention.q_proj.", "attn.k.": "attention.k_proj.",
    "attn.v.": "attention.v_proj.", "attn.proj": "attention.o_proj"}


def transformers_names(state, names):
    """The weights under other names: query, key and value apart, and the model's pooler."""
    theirs = {"pooler.dense.weight": BESIDE}
    for name, x in state.items():
        for letter, third in zip("qkv", x.chunk(3)) if "qkv" in name else [("", x)]:
            other = name.replace("qkv", letter)
            for timm, new in names.items():
                other = other.replace(timm, new)
            theirs[other] = third
    return theirs


def under(prefix, state, shift=0):
    """The weights under a prefix; shifted, they are others, which must not be taken."""
    return {prefix + name: x + shift for name, x in state.items()}


def safetensors(state, dtype="F32"):
    """The bytes of such a file: header length, JSON, numbers."""
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    entries, body = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        start, body = len(body), body + x.to(kind).view(torch.uint8).numpy().tobytes()
        entries[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [start, len(body)]}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + body


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


BESIDE = torch.ones(2)  # a tensor that is no part of a ViT
FORMATS = {  # a name → what the file holds
    "timm": lambda s: s | {"pre_logits.fc.weight": BESIDE, "head.weight": BESIDE},
    "one inside another": lambda s: {"state_dict": {"model": under("encoder.", s)}, "epoch": 3},
    "Lightning": lambda s: {"state_dict": {"loss.w": BESIDE} | under("model.backbone.", s)},
    "DINO": lambda s: {"student": under("module.backbone.", s, 1),
                       "teacher": under("backbone.", s) | {"head.mlp.0.weight": BESIDE},
                       "args": argparse.Namespace(lr=0.1)},
    "student before teacher": lambda s: {"model": under("student.vit.", s, 1) | under("teacher.vit.", s)},
    "MoCo v3": lambda s: {"state_dict": under("module.base_encoder.", s | {"head.0.weight": BESIDE})
                          | under("module.momentum_encoder.", s, 1)},
    "MAE": lambda s: {"model": s | {"mask_token": BESIDE, "decoder_pos_embed": BESIDE,
                                    "decoder_blocks.0.norm1.weight": BESIDE}},
    "f32": safetensors,
    "f16": lambda s: safetensors(s, "F16"),
    "bf16": lambda s: safetensors(s, "BF16"),
    "transformers": lambda s: under("vit.", transformers_names(s, SAVED)),
    "transformers in memory": lambda s: transformers_names(s, IN_MEMORY),
}


@pytest.mark.parametrize("name", FORMATS)
def test_one_vit_in_every_format_gives_the_same_features(tmp_path, name):
    state, model = backbone_of(small(experts=0)), ase.ASE(small()).eval()
    source = randomise(ase.ASE(small(experts=0))).float()
    path = tmp_path / "it's \"mine\" ✓.pth"
    write(path, FORMATS[name](state))
    told = ase.load_backbone(model, str(path))
    images = random(3, 3, 8, 8)
    expected = source.double().features(images)[0].expand(2, 3, 5, 18)
    tolerance = {"f16": 0.02, "bf16": 0.2}.get(name, 1e-10)
    torch.testing.assert_close(model.double().features(images)[0], expected, rtol=0, atol=tolerance)
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
        assert grid[0, :, 1].diff().gt(0).all() and grid[..., 1].mean().item() == pytest.approx(1.5, abs=1e-4)


FAULTS = [  # what the file holds, what is said of it
    (lambda s: b"", "cannot read"), (lambda s: b"are these weights?", "cannot read"),
    (lambda s: b"cos\nsystem\n(S'touch executed'\ntR.", "cannot read"),  # a pickle that runs a command
    (lambda s: s | {"best": np.float64(0.5)}, "cannot read"),  # pickled by a function of numpy's
    (lambda s: BESIDE, "holds no ViT"), (lambda s: {"fc\nweight": BESIDE}, r"holds no ViT .*fc\\nweight"),
    (lambda s: {name.replace("norm.", "fc_norm."): x for name, x in s.items()}, "lacks norm.weight"),
    (lambda s: transformers_names(s, IN_MEMORY | {"attn.k.": "lost."}), "lacks blocks.0.attn.qkv.weight"),
    (lambda s: s | {"norm.bias": torch.zeros(17)}, r"norm.bias .*\(17,\).*\(18,\)"),
    (lambda s: backbone_of(small(image=16, patch=8)), r"patch_embed.*3, 8, 8\).*3, 4, 4\)"),
    *((lambda s, shape=shape: s | {"pos_embed": torch.zeros(shape)}, "positions: not|pos_embed")
      for shape in ((1, 7, 18), (2, 5, 18), (18,))),
    (lambda s: {name: s[name] for name in s if name != "pos_embed"}, "rotary positions are not supported"),
    (lambda s: s | {"dist_token": BESIDE}, r"no plain ViT: DeiT's distillation .*\(dist_token\)"),
    (lambda s: s | {"vision_model.pre_layrnorm.weight": BESIDE}, "no plain ViT: CLIP's first norm"),
    (lambda s: s | {"blocks.0.mlp.w12.weight": BESIDE}, "no plain ViT: SwiGLU"),
    (lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer: `git lfs pull`"),
    (lambda s: b"\n<!DOCTYPE html><html>not found</html>", "it is a web page"),
    (lambda s: backbone_of(small(depth=3)), "blocks.2.norm1.weight, for which the model has no place"),
    *((lambda s, name=name: s | {name: BESIDE}, f"holds {name}, for which") for name in (
        "registers", "norm_before.weight", "blocks.0.ls1.gamma", "blocks.1.attn.k_norm.weight"))]


@pytest.mark.parametrize("content, told", FAULTS)
def test_a_bad_weights_file_is_one_line_at_once_and_changes_nothing(tmp_path, monkeypatch, content, told):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights"
    model, untouched = (randomise(ase.ASE(small())) for _ in range(2))
    with pytest.raises(ValueError, match="^no weights file [^\n]*$"):
        ase.load_backbone(model, path)
    write(path, content(backbone_of(small())))
    with pytest.raises(ValueError, match=f"^[^\n]*({told})[^\n]*$"):
        ase.load_backbone(model, path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [lambda s: s, safetensors])
def test_a_weights_file_cut_anywhere_or_with_a_flipped_bit_is_one_line(tmp_path, content):
    """Of torch.save's file all bytes have a checksum; of the other one the header must at least be read."""
    path, state = tmp_path / "weights", {"cls_token": torch.randn(1, 1, 7), "second": torch.arange(5.0)}
    write(path, content(state))
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^cannot read [^\n]*$"):
            ase.load(path)
    checked, damaged = whole.startswith(b"PK"), 0
    for at in range(0, whole.index(b"PK\1\2" if checked else b"}}") + 1, 3):  # up to the zip's own list
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1:])
        try:
            found = ase.load(path)
            assert not checked or all(torch.equal(found[name], state[name]) for name in state)
        except ValueError as error:
            damaged += "is damaged" in str(error) if checked else 1
            assert "\n" not in str(error)
    assert damaged > 10


def test_the_command_prints_every_row_of_table_1_and_refuses_a_flag_in_one_line(capsys, fails):
    assert "--unknown" in fails(ase.main, "--unknown")
    ase.main([])
    rows = capsys.readouterr().out.splitlines()
    # 5 tasks · 768 · N numbers in each of 12 blocks less
    assert rows[9].endswith(" 106.04 for N = 16, 106.77 for N = 32, 108.25 for N = 64")
    millions = ["103.52", "106.77", "108.25", "106.77", "108.25", "111.20"]  # by hand
    for name, total, row in zip(ase.TABLE1, millions, rows[3:9], strict=True):
        c = ase.TABLE1[name][1]
        assert c.experts == 0 or name.endswith(f"({c.experts}/{c.topk}/{c.shared}/{c.rank})")
        assert row.startswith(name) and row.split()[-3] == total


DINO2 = dict(image=21, patch=7, dim=192, depth=2, heads=3, registers=2, head_dim=256)  # 9 patches


def dinov2():
    """A state dict under timm's names: LayerScale, two registers, nothing left at zero or one."""
    model = randomise(ase.ASE(ase.Config(**DINO2, experts=0)))
    names = [*vit_names(2), "registers"]
    state = {name: p.data for name, p in model.named_parameters() if name in names}
    return state | {f"blocks.{i}.ls{j}.gamma": random(192, seed=2 * i + j) for i in (0, 1) for j in (1, 2)}


def dinov2_by_hand(s, images, heads=3):
    """The features of such a ViT, its forward pass written out."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    weight = s["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, s["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).mT
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], 1) + s["pos_embed"]
    x = torch.cat([x[:, :1], s["registers"].expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(2):
        b = f"blocks.{i}"
        qkv = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        x = x + s[f"{b}.ls1.gamma"] * linear(mixed, f"{b}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1"))
        x = x + s[f"{b}.ls2.gamma"] * linear(hidden, f"{b}.mlp.fc2")
    return norm(x, "norm")


def renamed(state, names):
    for old, new in names.items():
        state = {name.replace(old, new): x for name, x in state.items()}
    return state


THEIRS = SAVED | {"registers": "embeddings.register_tokens", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
                  "norm1": "norm1", "norm2": "norm2", "ls1.gamma": "layer_scale1.lambda1",
                  "ls2.gamma": "layer_scale2.lambda1"}
MODERN = {  # a name → what the file holds
    "DINOv2": lambda s: renamed(s, {"registers": "register_tokens"}) | {"mask_token": BESIDE},
    "timm": lambda s: renamed(s, {"registers": "reg_token"}) | {"pos_embed": s["pos_embed"][:, 1:]},
    "DeiT III": lambda s: {"model": renamed(s, {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"})
                           | {"pos_embed": s["pos_embed"][:, 1:]}},
    "transformers": lambda s: transformers_names(s, THEIRS),
    "in memory, deep": lambda s: {"epoch": 3, "net": {"a": {"b": transformers_names(s, THEIRS | {
        "attn.q.": "attention.q_proj.", "attn.k.": "attention.k_proj.", "attn.v.": "attention.v_proj.",
        "attn.proj": "attention.o_proj"})}}}}


@pytest.mark.parametrize("name", MODERN)
def test_layer_scale_registers_and_positions_of_todays_backbones(tmp_path, name):
    state, images = dinov2(), random(2, 3, 21, 21)
    state["pos_embed"][:, 0] *= name not in ("timm", "DeiT III")
    write(tmp_path / "weights", MODERN[name](state))
    assert ase.shape_of(str(tmp_path / "weights")) == DINO2
    model = ase.ASE(ase.Config(**DINO2, experts=4, topk=2, rank=1)).double().eval()
    assert "3 attention heads assumed" in ase.load_backbone(model, tmp_path / "weights")
    tokens, _ = model.features(images)
    expected = dinov2_by_hand(state, images)
    torch.testing.assert_close(tokens, expected.expand(5, -1, -1, -1), rtol=0, atol=1e-5)
    assert model(images)[0]["edge"].shape == (2, 1, 21, 21)
    assert not model.registers.requires_grad and model.heads["edge"].extra == 3


@pytest.mark.parametrize("width, prefix, heads", [
    (128, "", 4), (384, "", 6), (384, "module.base_encoder.", 12), (768, "module.base_encoder.", 12),
    (1024, "", 16), (1280, "", 16), (1408, "", 16)])
def test_the_number_of_heads_is_that_of_published_vits(tmp_path, width, prefix, heads):
    state = {"cls_token": torch.zeros(1, 1, width), "pos_embed": torch.zeros(1, 1 + 37 ** 2, width),
             "patch_embed.proj.weight": torch.zeros(width, 3, 14, 14), "blocks.0.norm1.bias": torch.zeros(5)}
    write(tmp_path / "weights", under(prefix, state))
    head_dim = 32 if width == 128 else 256
    assert ase.shape_of(tmp_path / "weights") == dict(
        image=224, patch=14, dim=width, depth=1, heads=heads, registers=0, head_dim=head_dim)


@pytest.mark.parametrize("library, name", [
    ("timm", "vit_small_patch14_reg4_dinov2"), ("timm", "deit3_small_patch16_224"),
    ("transformers", "ViT"), ("transformers", "Dinov2"), ("transformers", "Dinov2WithRegisters")])
def test_features_are_those_of_other_libraries(tmp_path, library, name):
    theirs = pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)
    side = 64 if "16" in name else 56
    if library == "timm":
        model = randomise(theirs.create_model(name, img_size=side, depth=2, num_classes=0))
    else:
        config = getattr(theirs, f"{name}Config")(
            hidden_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=side, patch_size=14,
            layer_norm_eps=1e-6, intermediate_size=512)
        model = randomise(getattr(theirs, f"{name}Model")(config))
    write(tmp_path / "weights", model.state_dict())
    shape, images = ase.shape_of(tmp_path / "weights") | {"image": side}, random(2, 3, side, side)
    ours = ase.ASE(ase.Config(**shape, experts=0)).double().eval()
    ase.load_backbone(ours, tmp_path / "weights")
    expected = model.forward_features(images) if library == "timm" else model(images).last_hidden_state
    torch.testing.assert_close(ours.features(images)[0][0], expected)


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


def maps(rng, h=29, w=31):
    """Random maps of all densities, blobs, tiny ones, and shapes of 41×37 pixels."""
    out = [rng.random((h, w)) < density for density in (0.1, 0.3, 0.5, 0.7, 0.9)]
    out += [ndimage.gaussian_filter(rng.standard_normal((h, w)), size) > 0 for size in (1, 2, 3)]
    out += [rng.random(shape) < 0.7 for shape in 5 * [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5)]]
    y, x = np.mgrid[:41, :37]
    radius = (y - 20) ** 2 + (x - 17) ** 2
    return out + [radius < 150, (radius < 150) & (radius > 60), radius >= 0, radius < 0, abs(y - x) < 3,
                  (y % 7 < 2) | (x % 11 < 2)]


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
    singly = [thin(image) for image in stack]
    for once in thin(words), thin_words(words[None])[0]:
        assert once.dtype == np.uint64
        for k in range(64):
            assert ((once >> np.uint64(k) & np.uint64(1)) == singly[k]).all()
    assert (thin(torch.from_numpy(stack)).numpy() == np.stack(singly)).all()
    for passes in (1, 2):
        assert (thin(torch.from_numpy(stack), passes).numpy() == thin(stack, passes)).all()


@pytest.mark.parametrize("shape", [(2, 3), (5, 2), (31, 37)])
def test_boundaries_is_scipys_laplacian(shape):
    rng = np.random.default_rng(4)
    for high in (2, 4, 460):
        labels = rng.integers(0, high, (3, *shape))
        expected = [ndimage.laplace(x, mode="mirror") != 0 for x in labels]
        assert (boundaries(torch.from_numpy(labels.astype(np.int16))).numpy() == expected).all()


def slow_seg2bmap(labels):
    """The pixels whose label is not that of the east, south or south-east neighbour, where there is one."""
    h, w = labels.shape
    found = np.zeros((h, w), bool)
    for y, x in itertools.product(range(h), range(w)):
        around = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        found[y, x] = any(j < h and i < w and labels[j, i] != labels[y, x] for j, i in around)
    return found


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3), (13, 11)])
def test_seg2bmap_is_its_definition(shape):
    rng = np.random.default_rng(13)
    for high in (2, 3, 460):
        for labels in rng.integers(0, high, (5, *shape)):
            assert (evaluate.seg2bmap(labels) == slow_seg2bmap(labels)).all()


def test_the_truths_of_training_and_of_evaluation_in_one_picture():
    """labels           judged (odsF)    trained on

       0 0 1 2 2 2      . . . . . .      . # . # . .     The strip of ones: seg2bmap draws it two pixels wide,
       0 0 1 2 2 2      . # . . . .      . # . # . .     which thinning makes one line; the Laplacian leaves
       0 0 1 2 2 2      . . # # # #      . # . . # .     its middle out, since 1 lies between 0 and 2, and
       0 0 1 3 3 3      . # . . . .      . # . # . .     keeps both sides.
       0 0 1 3 3 3      . # . . . .      . . # . . .
       0 0 1 3 3 3      . # . . . .      . . . . . .
    """
    picture = test_the_truths_of_training_and_of_evaluation_in_one_picture.__doc__.splitlines()[2:8]
    labels, judged, trained = np.split(np.array([line.split()[:18] for line in picture]), 3, 1)
    labels = labels.astype(int)
    assert (thin(evaluate.seg2bmap(labels)) == (judged == "#")).all()
    assert (thin(edges_of(labels)) == (trained == "#")).all()


def slow_suppress(prob):
    """metrics: the structured-edges toolbox, pixel by pixel, in float64."""
    h, w = prob.shape
    pixels = [*itertools.product(range(h), range(w))]

    def at(a, i, j):  # symmetric padding
        i = i if 0 <= i < h else (-1 - i if i < 0 else 2 * h - 1 - i)
        j = j if 0 <= j < w else (-1 - j if j < 0 else 2 * w - 1 - j)
        return a[i, j]

    def gradient(a):  # (along x, along y)
        gx, gy = np.zeros((h, w)), np.zeros((h, w))
        for i, j in pixels:
            left, right, up, down = max(j - 1, 0), min(j + 1, w - 1), max(i - 1, 0), min(i + 1, h - 1)
            gx[i, j] = (a[i, right] - a[i, left]) / (right - left)
            gy[i, j] = (a[down, j] - a[up, j]) / (down - up)
        return gx, gy

    smooth = np.zeros((h, w))
    for (i, j), a, b in itertools.product(pixels, range(-4, 5), range(-4, 5)):
        smooth[i, j] += (5 - abs(a)) * (5 - abs(b)) / 625 * at(prob, i + a, j + b)
    ox, oy = gradient(smooth)
    oxx, _ = gradient(ox)
    oxy, oyy = gradient(oy)
    out = prob.copy()
    for i, j in pixels:
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
        a, b = np.argwhere(predicted), np.argwhere(gt)
        allowed = np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=-1)) <= reach
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


def plain_counts(prob, gt, thresholds, max_dist=0.0075, nms=True):
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
        expected = plain_counts(prob, gt, thresholds, reach, nms)
        assert (edge_counts(prob, gt, thresholds, reach, nms) == expected).all()
    # as many predicted as truth pixels: paths grow long, and the matching needs several rounds
    rng = np.random.default_rng(9)
    prob, gt = rng.random((113, 109)), thin(rng.random((113, 109)) < 0.5)
    expected = plain_counts(prob, gt, [0.5], 0.015, nms=False)
    assert (edge_counts(prob, gt, [0.5], 0.015, nms=False) == expected).all()


@pytest.mark.parametrize("nms", [True, False])
def test_a_500_pixel_image_counts_as_the_plain_way_and_faster(nms):
    scene = demo.scene(3, 375, 500)
    edges = edges_of(scene["labelmap"].astype(np.int32))
    noise = np.random.default_rng(0).random((2, 375, 500))
    noise = [ndimage.gaussian_filter(x, 4) * 20 - 9.5 for x in noise]  # about 0.5 ± 0.3
    prob = (2 * ndimage.gaussian_filter(edges.astype(float), 1.5) * noise[0] + 0.3 * noise[1]).clip(0, 1)
    start = time.process_time()
    ours = edge_counts(prob, thin(edges), THRESHOLDS, nms=nms)
    middle = time.process_time()
    plain = plain_counts(prob, thin(edges), THRESHOLDS, nms=nms)
    end = time.process_time()
    assert (ours == plain).all() and ours[:, 0].max() > 1000
    assert end - middle > 2 * (middle - start)


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
    shuffled = rng.permutation(count)
    assert (edge_counts(prob, gt, thresholds[shuffled], 0.08) == counts[shuffled]).all()


def points(shape, *at):
    out = np.zeros(shape, dtype=bool)
    out[tuple(zip(*at))] = True
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


def test_the_thresholds_and_what_is_exactly_at_one_is_not_above_it():
    assert len(THRESHOLDS) == 101 and THRESHOLDS[0] == 0.001 and THRESHOLDS[-1] == 0.999
    assert np.allclose(THRESHOLDS[1:-1], np.linspace(0.01, 0.99, 99))
    prob = 0.2 * points((23, 29), (10, 10))
    for kind in (np.float32, np.float64):
        counts = edge_counts(prob.astype(kind), prob > 0, THRESHOLDS[19:22], nms=False)
        assert counts.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1]]


def test_nothing_predicted_and_no_truth():
    gt = points((23, 29), (10, 10), (3, 4))
    for nms in (True, False):
        assert edge_counts(np.zeros(gt.shape), gt, [0.3, 0.6], nms=nms).tolist() == [[0, 0, 2], [0, 0, 2]]
        empty = edge_counts(np.random.default_rng(11).random((23, 29)), gt & False, [0.3, 0.6], nms=nms)
        assert (empty[:, 1] > 0).all() and not empty[:, [0, 2]].any()
    assert ods_f([[0, 0, 2], [0, 0, 2]]) == 0
    assert np.isnan(ods_f(empty))


def test_ods_f_by_hand():
    """P = 6/8, R = 6/12: F = 0.6. P = 9/24, R = 9/12: F = 0.5. No mean over images, no interpolation."""
    assert ods_f([[6, 8, 12], [9, 24, 12], [0, 0, 12]]) == pytest.approx(60)
    one, two = np.array([[1, 1, 1]]), np.array([[0, 8, 4]])
    assert ods_f(one + two) == pytest.approx(100 * 2 * (1 / 9) * (1 / 5) / (1 / 9 + 1 / 5))


@pytest.mark.parametrize("prob", [np.full((11, 13), np.nan), np.zeros((11, 13), bool), np.zeros((13, 11))])
def test_bad_input_is_told(prob):
    with pytest.raises(ValueError, match="expected floats in .0, 1., no NaN, and .H, W. for both"):
        edge_counts(prob, np.zeros((11, 13), bool), [0.5])


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
        for annotator in scipy.io.loadmat(root / f"groundTruth/{path.stem}.mat")["groundTruth"].ravel():
            counts = edge_counts(prob, annotator["Boundaries"][0, 0] > 0, thresholds, nms=False)
            matched, truth = matched + counts[:, 0], truth + counts[:, 2]
        predicted = predicted + counts[:, 1]
    assert pictures and (matched / truth >= recall - 1e-6).all() and (matched / truth <= 1.002 * recall).all()
    confirmed = precision * predicted
    assert (abs(confirmed - confirmed.round()) <= 1e-6 * predicted).all()


# ----------------------------------------------------------------------------------------------- the pictures

def drawn(path):
    """A picture that opens, is not one colour, and is less than 1 MB."""
    with Image.open(path) as opened:
        image = np.asarray(opened)
    return image.std() > 1 and path.stat().st_size < 1e6


def test_palette_is_vocs():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0),
             12: (64, 0, 128), 15: (192, 128, 128), 16: (0, 64, 0), 20: (0, 64, 128)}
    assert all(tuple(PALETTE[i]) == colour for i, colour in known.items())


def test_paint_by_hand():
    void = [224] * 3
    depth = Task(1, 1, "l1", "rmse", True, "depth")
    cases = [(TASKS["semseg"], [[15, 255]], [[192, 128, 128], void]),
             (TASKS["sal"], [[0, 1, 0.2, 255]], [[255] * 3, [0] * 3, [204] * 3, void]),
             (TASKS["sal"], [[255, 255]], [void, void]),
             (TASKS["edge"], [[False, True]], [[255] * 3, [0] * 3]),
             (TASKS["normals"], [[[0, 0]], [[-1, 0]], [[1, 0]]], [[128, 0, 255], void]),
             (depth, [[0, 10.0, 255]], [[255] * 3, [0] * 3, void])]
    for task, values, colours in cases:
        assert paint(task, values).tolist() == [colours]


@pytest.fixture
def plots(monkeypatch):
    """The calls of `evaluate.plot` from here on."""
    spy = mock.Mock(wraps=evaluate.plot)
    monkeypatch.setattr(evaluate, "plot", spy)
    return spy.call_args_list


@pytest.mark.parametrize("layers, experts, shared", [(6, 32, 2), (12, 64, 4), (1, 1, 0), (2, 300, 1)])
def test_experts_are_the_darker_the_larger_their_gates(tmp_path, plots, layers, experts, shared):
    """A row for a task, a column for the first, third and last epoch; the first layer is at the bottom."""
    gates = {epoch: rng.random((layers, 5, experts)) for epoch in (1, 2, 3, 4)}
    draw_experts(tmp_path / "e.png", [(e, values.tolist()) for e, values in gates.items()], [*TASKS], shared)
    light = np.stack([call.kwargs["heat"][::-1].sum(-1) for call in plots[:-1]]).astype(int)
    values = np.stack([gates[epoch][:, t] for t in range(5) for epoch in (1, 3, 4)])
    assert (np.diff(light.ravel()[values.argsort(axis=None)]) <= 0).all() and light.min() == 0
    assert bool(plots[0].kwargs["series"]) == bool(shared) and drawn(tmp_path / "e.png")


def test_without_experts_or_steps_nothing_is_drawn(tmp_path):
    for epochs in [], [(1, np.zeros((6, 5, 0)).tolist())]:
        draw_experts(tmp_path / "e.png", epochs, [*TASKS], 0)
    draw_curves(tmp_path / "c.png", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 300])
def test_curves_and_the_share_of_the_shared_experts(tmp_path, plots, count):
    gates = rng.random((3, 2, 2, 5))  # epochs, layers, tasks, experts
    records = [{"kind": "step", "step": s, "epoch": s / count, "losses": {"sal": 1 / s, "edge": 0.5},
                "lr": 1e-4 * s} for s in range(1, count + 1)]
    draw_curves(tmp_path / "steps.png", records, shared=2, topk=3)
    records += [{"kind": "epoch", "step": 7 * e, "epoch": e, "val": {"sal": 1.0, "edge": e / 2},
                 "gates": gates[e - 1].tolist()} for e in (1, 2, 3)]
    draw_curves(tmp_path / "none.png", records)
    assert {call.kwargs["labels"][0] for call in plots} == {"sal", "edge"}
    draw_curves(tmp_path / "shared.png", records, shared=2, topk=3)
    assert all(drawn(path) for path in tmp_path.iterdir())
    (_, raw, *_), (_, mean, *_), (at, val, *_) = plots[-2].kwargs["series"]  # of edge
    assert [*raw] == [0.5] * count == pytest.approx([*mean]) and at == [7, 14, 21] and val == [0.5, 1, 1.5]
    (_, neutral, *_), *shares = plots[-1].kwargs["series"]
    assert neutral == (2 / 5, 2 / 5)
    for t, (steps, share, *_) in enumerate(shares):
        expected = [sum(gates[e, :, t, 0] + gates[e, :, t, 1]) / 2 for e in range(3)]
        assert steps == [7, 14, 21] and share == pytest.approx(expected)


@both_gatings
def test_gates_of_every_token_have_the_mean_that_routing_tells(gating):
    model, images = randomise(ase.ASE(small(gating=gating))), random(3, 3, 8, 8)
    gates = evaluate.gates_of(model, images, first=0)
    assert gates.shape == (2, 2, 3, 5, 7)                                     # blocks, T, B, L, N
    torch.testing.assert_close(gates.mean((2, 3)), model(images)[1].gates)
    assert torch.equal(evaluate.gates_of(model, images), gates[..., 1:, :])   # the patches alone
    model.blocks[1].experts = None
    torch.testing.assert_close(evaluate.gates_of(model, images, first=0), gates[:1])


@pytest.mark.parametrize("change, columns", [(dict(), 5), (dict(shared=0, topk=4), 4), (dict(depth=9), 7)])
def test_routing_shows_the_expert_with_the_largest_gate_of_each_patch(tmp_path, monkeypatch, change, columns):
    torch.manual_seed(0)
    model, image = ase.ASE(small(**change)), np.random.default_rng(0).integers(0, 256, (36, 48, 3), np.uint8)
    for router in (router for block in model.blocks for router in block.experts.router.values()):
        router.data *= 50  # gates far apart
    drawn_rows = []
    monkeypatch.setattr(evaluate, "sheet", lambda rows, *more, **named: drawn_rows.extend(rows))
    samples = [(image, {task: np.zeros((36, 48), int) for task in SMALL["tasks"]})]
    evaluate.draw_routing(tmp_path / "routing.png", model, samples, "imagenet", torch.device("cpu"))
    x = evaluate.to_input(model, image.transpose(2, 0, 1), "imagenet", "cpu")
    gates = evaluate.gates_of(model, x)[:, :, 0].numpy()                      # (layers, T, P, N)
    assert [len(row) for row in drawn_rows] == 2 * [columns]
    layers = np.linspace(0, len(gates) - 1, 4).astype(int) if len(gates) > 4 else range(len(gates))
    for task, row in enumerate(drawn_rows):
        squares = [cell[34::67, 45::90] for cell in row[2:]]                  # the middle of 2 × 2 patches
        for layer, square in zip(layers, squares):
            best = gates[layer, task].argmax(-1)
            colours = square.reshape(4, 3).tolist()
            assert [colour == [0, 0, 0] for colour in colours] == (best < model.config.shared).tolist()
            for a, b in itertools.combinations(range(4), 2):
                assert (best[a] == best[b]) == (colours[a] == colours[b]) or max(best[[a, b]]) < 2
        if model.config.shared:
            share = gates[:, task, :, :2].sum(-1).mean(0)
            assert (share.argsort() == (255 - squares[-1].reshape(4, 3)[:, 0].astype(int)).argsort()).all()


# --------------------------------------------------------------------------------------------------- the data

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A small demo that every test reads and none writes: 13 and 7 images of at most 48 pixels."""
    root = tmp_path_factory.mktemp("data") / "mini"
    demo.make_demo(root, 13, 7, 48)
    return root


@pytest.fixture
def broken(mini, tmp_path):
    """A copy of the small demo to break. Its first image, 2008_000001, is 48×36."""
    return shutil.copytree(mini, tmp_path / "broken")


def tree(root):
    """When each file below a folder was written, and which one it is."""
    stats = {path: path.stat() for path in sorted(root.rglob("*")) if path.is_file()}
    return {path: (stat.st_mtime_ns, stat.st_ino) for path, stat in stats.items()}


SHORT = "--weights none --size 32 --epochs 2 --batch 4 --experts 4 --topk 2 --rank 2 --device cpu".split()


def flags(root, out, more=""):
    """What train.py is told for a short run into the folder `out`."""
    return ["--data", str(root), "--out", str(out), *SHORT, *more.split()]


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
    """What evaluate.py prints, in a folder of its own."""
    def run(*argv):
        capsys.readouterr()
        evaluate.main([*map(str, argv), "--device", "cpu"])
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    return run


def settings_of(run, **changes):
    """A run's config.json, changed and written."""
    settings = json.loads((run / "config.json").read_text()) | changes
    (run / "config.json").write_text(json.dumps(settings))
    return settings


def weights_of(run):
    return evaluate.load_checkpoint(run)["model"]


def logged(run, kind):
    return [record for record in evaluate.read_log(run) if record["kind"] == kind]


def result_of(path):
    """A result; a strict reader of JSON knows no NaN."""
    text = path.read_text(encoding="ascii")
    assert "NaN" not in text
    return json.loads(text)


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
    cow = ("cow", 10, head, struct([("muzzle", head)], "ab"))
    objects = struct([("person", 15, head | torso, parts), cow], "pqrs")
    files = {"JPEGImages/1.jpg": Image.new("RGB", (7, 5), (90, 90, 90)).convert(mode),
             "semseg/VOC12/1.png": Image.fromarray(np.uint8(voc)),
             "semseg/pascal-context/1.png": Image.new("L", (7, 5), 1),
             "sal_distill/1.png": Image.fromarray(np.uint8(127 + (voc == 15))),
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
    painted = [[0] * 7, [0, 2, 1, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0], [0] * 7, [0] * 7]
    assert truth["human_parts"].tolist() == painted  # in the order of the file
    assert (truth["sal"].numpy() == (voc == 15)).all()
    assert (truth["edge"].numpy() == slow_thin(ndimage.laplace(labels.astype(int), mode="mirror") != 0)).all()
    n = np.array([-1, 2 * 128 / 255 - 1, 1])
    expected = (n / np.linalg.norm(n))[:, None, None] * (labels == 284)  # sky has no normals
    np.testing.assert_allclose(truth["normals"].numpy(), expected, atol=1e-6)


def test_anno_with_one_object_none_or_without_parts_is_legal(tmp_path):
    mask, nothing = np.eye(5, 7, dtype=np.uint8), np.empty((0, 0))
    one = struct([("person", 15, mask, struct([("lfoot", mask)], "ab"))], "pqrs")
    bare = struct([("person", 15, mask, nothing), ("cow", 10, mask, nothing)], "pqrs")
    for objects, part in (one, 6), (bare, 0), (bare[:, :0], 0), (nothing, 0):
        scipy.io.savemat(tmp_path / "anno.mat", {"anno": struct([("name", objects)], "xy")})
        assert (data.decode_parts(tmp_path / "anno.mat", (7, 5)) == part * mask).all()


def test_the_tables_are_the_fields():
    """A copy of the 24 part names, weights and channels; a checksum of the 170 classes with normals."""
    parts = ("hair head lear lebrow leye mouth nose rear rebrow reye", "neck torso", "luarm ruarm",
             "lhand llarm rhand rlarm", "luleg ruleg", "lfoot llleg rfoot rlleg")
    assert data.PART_OF == {part: n for n, names in enumerate(parts, 1) for part in names.split()}
    assert data.PART_CLASSES[1:] == ("head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
    assert len(data.VALID_NORMALS) == 170 and zlib.crc32(str(data.VALID_NORMALS).encode()) == 0xDA615933
    rows = {"semseg": (21, 1, False), "human_parts": (7, 2, False), "sal": (1, 5, False),
            "edge": (1, 50, False), "normals": (3, 10, True)}
    assert rows == {name: (task.channels, task.weight, task.lower_is_better) for name, task in TASKS.items()}
    assert " ".join(data.VOC_CLASSES) == (
        "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
        "person pottedplant sheep sofa train tvmonitor")
    black_and_white = torch.tensor([0.0, 255]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    np.testing.assert_allclose(data.normalise(black_and_white, "imagenet").flatten(1),
                               [[-2.1179, -2.0357, -1.8044], [2.2489, 2.4286, 2.64]], atol=1e-4)
    assert data.normalise(black_and_white, "half").flatten().tolist() == [-1] * 3 + [1] * 3


def test_sixteen_bits_and_floats_are_refused(broken):
    for name, mode, dtype in (("sal", "I;16", np.uint16), ("normals", "F", np.float32)):
        path = data.find(broken, name, "2008_000001")
        Image.fromarray(np.full((36, 48), 1, dtype)).save(path, "TIFF")
        with pytest.raises(data.UserError, match=f"{path} .*mode {mode}: expected 8 bits a channel"):
            data.read_map(broken, name, "2008_000001", (48, 36))


def test_files_are_read_anew_and_resized(broken):
    """A corrected map is seen under its old date, too, and one of another size is legal."""
    dataset = data.PascalContext(broken, "train", 32, ["sal", "normals"])
    sal, normals = (data.find(broken, task, "2008_000001") for task in dataset.tasks)
    before, written = dataset[0][1], sal.stat().st_mtime_ns
    Image.new("L", (24, 18), 255).save(sal)
    os.utime(sal, ns=(written, written))
    Image.new("RGB", (9, 7), (128, 0, 128)).save(normals)
    after = dataset[0][1]
    assert not before["sal"].all() and after["sal"].all() and after["sal"].shape == (36, 48)
    known = before["normals"].any(0)
    assert known.any() and (after["normals"][1] < -0.99).equal(known)


def a_scene():
    """Random planes of all maps, (11, 48, 48): image, normals, saliency, semseg, parts, LabelMap."""
    generator = np.random.default_rng(3)
    planes = generator.integers(0, 256, (11, 48, 48), np.uint8)
    planes[6:9] %= np.array([2, 21, 7], np.uint8)[:, None, None]
    labels = np.kron(generator.choice([284, 59, 360], (6, 6)), np.ones((8, 8), int))
    planes[9:] = labels & 255, labels >> 8
    return torch.from_numpy(planes)


def warped(planes, matrix=((1, 0), (0, 1))):
    """The images and targets of a batch of one."""
    matrix = torch.tensor([matrix], dtype=torch.float32)
    return data.warp(planes[None], torch.tensor([[48, 48]]), 48, "imagenet", TASKS, matrix)


def test_a_warp_without_augmentation_is_the_image_and_a_mirrored_one_mirrors_every_map():
    planes = a_scene()
    images, targets = warped(planes)
    truth = data.targets(planes[None], edges=lambda labels: thin(boundaries(labels), passes=2))
    torch.testing.assert_close(targets, truth, rtol=0, atol=1e-6)
    np.testing.assert_allclose(images, data.normalise(planes[None, :3].float(), "imagenet"), atol=1e-4)
    mirrored_images, mirrored = warped(planes, ((-1, 0), (0, 1)))
    np.testing.assert_allclose(mirrored_images, images.flip(3), atol=1e-4)
    for task in ("semseg", "human_parts", "sal"):
        assert (mirrored[task] == targets[task].flip(2)).all()
    normals = targets["normals"].flip(3) * torch.tensor([-1.0, 1, 1]).view(3, 1, 1)
    np.testing.assert_allclose(mirrored["normals"], normals, atol=1e-6)


def test_normals_turn_with_their_image():
    """A quarter turn: what pointed right points down, and the pixel at the right is found at the bottom."""
    planes = a_scene()
    planes[3:6] = torch.tensor([255, 127, 127])[:, None, None]
    planes[9:] = torch.tensor([284 - 256, 1])[:, None, None]
    planes[7], planes[7, 24, 40] = 0, 7
    _, targets = warped(planes, ((0, 1), (-1, 0)))
    x, y, _ = targets["normals"][0, :, 24, 24].tolist()
    assert abs(x) < 0.01 and y > 0.99
    assert targets["semseg"][0].argmax().item() == 40 * 48 + 23


def test_outside_of_the_image_nothing_is_true_without_people_no_part_and_no_edge_arises():
    planes = a_scene()
    planes[8] = 0
    planes[9:] = torch.tensor([284 - 256, 1])[:, None, None]
    _, targets = warped(planes, ((1.5, 0), (0, 1.5)))
    for task in ("semseg", "sal", "edge"):
        assert (targets[task][0, :7] == IGNORE).all() and (targets[task][0, :, :7] == IGNORE).all()
    assert (targets["human_parts"] == IGNORE).all()
    assert not targets["normals"][0, :, :7].any() and not (targets["edge"] == 1).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_sizes_share_a_batch_and_a_broken_file_is_one_line(broken, workers):
    dataset, plan = data.PascalContext(broken, "train", 32), [[0, 1, 2], [0], [1], [2], [0, 3]]
    bad = data.find(broken, "sal", dataset.ids[3])
    bad.write_text("no picture")
    canvases = dataset.canvases(plan, torch.device("cpu"), workers)
    batch, *single = (data.warp(*next(canvases), 32, "imagenet") for _ in range(4))
    for i, alone in enumerate(single):
        np.testing.assert_allclose(batch.images[i], alone.images[0], atol=1e-4)
        for task in TASKS:
            np.testing.assert_allclose(batch.targets[task][i], alone.targets[task][0], atol=1e-6)
    with pytest.raises(data.UserError, match=f"cannot read {bad} .*replace the file"):
        next(canvases)
    assert type(dataset.canvas([0])[0]) is np.ndarray and type(dataset.canvas([0, 3])) is data.UserError


def test_every_file_that_the_tasks_need_is_looked_for(broken):
    data.find(broken, "semseg", "2009_000002").unlink()
    data.PascalContext(broken, "train", 32, ["sal"]).require_files()
    with pytest.raises(data.UserError, match="has no .*2009_000002.png: `python data.py"):
        data.PascalContext(broken, "train", 32).require_files()


def test_random_warps_stay_in_their_ranges():
    matrices = data.random_warps(2000, torch.Generator().manual_seed(0))
    scale = matrices.det().abs().rsqrt()
    assert 0.75 <= scale.min() < 0.76 and 1.24 < scale.max() <= 1.25001
    assert 0.45 < (matrices.det() < 0).float().mean() < 0.55
    angle = torch.atan2(matrices[:, 1, 0].abs(), matrices[:, 1, 1].abs()).rad2deg()
    assert 19.5 < angle.max() <= 20.001


def test_the_demos_scenes_agree_with_themselves_and_with_their_files(mini):
    for id, seed in (("2008_000013", 12), ("2010_000001", 10**7)):
        scene, again = demo.scene(seed, 36, 48), demo.scene(seed, 36, 48)
        assert all((scene[name] == again[name]).all() for name in scene if name != "objects")
        parts = np.zeros((36, 48), int)
        for kind, index, mask, pieces in scene["objects"]:
            assert data.VOC_CLASSES[index] == kind
            assert set(np.unique(scene["semseg"][mask])) <= {index, IGNORE}
            for name, piece in pieces:
                assert not (piece & ~mask).any()
                parts[piece] = data.PART_OF[name]
        planes = data.read_planes(mini, id, list(data.MAPS)).astype(int)
        image, normals = (scene[name].transpose(2, 0, 1) for name in ("image", "normals"))
        np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-4)
        assert abs(planes[:3] - image).mean() < 12 and abs(planes[3:6] / 127.5 - 1 - normals).max() < 0.005
        assert (planes[6:9] == [scene["saliency"], scene["semseg"], parts]).all()
        assert (planes[9] + 256 * planes[10] == scene["labelmap"]).all()


def test_a_data_set_is_known_wherever_it_lies_and_never_rendered_over(mini, broken, tmp_path):
    assert data.fingerprint(mini) == data.fingerprint(broken)  # a copy
    (broken / data.LISTS.format("val")).write_text("2008_000001")
    assert data.fingerprint(mini) != data.fingerprint(broken)
    for seed in (0, 1):
        demo.make_demo(tmp_path / f"{seed}", 2, 1, 16, seed)
    assert data.read_ids(tmp_path / "0", "train") == data.read_ids(tmp_path / "1", "train")
    assert data.fingerprint(tmp_path / "0") != data.fingerprint(tmp_path / "1")
    with pytest.raises(data.UserError, match=f"^{mini} exists: .*delete it$"):
        demo.make_demo(mini, 2, 1, 16)


@pytest.fixture
def check(broken, capsys, monkeypatch):
    """python data.py broken, in the folder that holds it: its exit code and what it prints."""
    monkeypatch.chdir(broken.parent)
    return lambda: (data.main([str(broken)]), capsys.readouterr().out)


def test_the_check_passes_a_good_set_draws_it_and_leaves_it_alone(broken, check):
    before, (code, told) = tree(broken), check()
    assert code == 0 and told.endswith(f"a training could start with --tasks {','.join(TASKS)}\n")
    for split, n in (("train", 13), ("val", 7)):
        assert all(f"\n{split:6}{name:12}{n:12}{n:12}{0:12}\n" in told for name in data.MAPS)
    people = [data.read_planes(broken, id, ["image", "human_parts"])[3].any()
              for id in data.read_ids(broken, "train")]
    assert f" {np.mean(people):.0%} of the images have human parts" in told
    assert "as expected" in told and "UPSIDE DOWN" not in told
    assert drawn(Path("contact_broken.png")) and tree(broken) == before


def test_the_check_counts_what_is_missing_or_broken_and_sees_normals_upside_down(broken, check):
    shutil.rmtree(broken / "human_parts")
    (broken / "JPEGImages/2008_000001.jpg").unlink()
    semseg = data.find(broken, "semseg", "2008_000003")
    Image.open(broken / "JPEGImages/2008_000003.jpg").save(semseg)
    for path in (broken / "normals_distill").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) ^ np.array([0, 255, 0], np.uint8)).save(path)
    code, told = check()
    for row in ("train image 13 12 0 missing: JPEGImages/2008_000001.jpg", "train sal 13 13 0",
                "train human_parts 13 0 0 missing: human", f"train semseg 13 13 1 cannot read {semseg} ("):
        assert row in " ".join(told.split())
    assert told.count(" 0% of the images have human parts") == 2 and told.count("UPSIDE DOWN") == 2
    assert code == 1 and "no training could start" in told


def test_many_jobs_run_in_other_processes_few_in_this_one_and_all_in_order():
    for total in (47, 48):
        jobs = (f"{n}, __import__('os').getpid()" for n in range(total))
        numbers, processes = zip(*data.parallel(eval, jobs, total, "test"))
        assert [*numbers] == [*range(total)] and (os.getpid() in processes) == (total < 48)


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
def test_each_loss_is_the_loop_over_pixels_the_sum_of_its_parts_and_zero_without_truth(task):
    prediction, target = random_maps(task)
    counts = evaluate.count_pixels({task: target})
    parts = [evaluate.losses({task: p}, {task: t}, counts)[task].item()
             for p, t in zip(prediction.split([2, 1]), target.split([2, 1]))]
    whole = evaluate.losses({task: prediction}, {task: target})[task].item()
    assert sum(parts) == pytest.approx(loss_by_hand(task, prediction, target), rel=1e-5) == whole
    nothing = target * 0 + (0 if task == "normals" else IGNORE)
    loss = evaluate.losses({task: prediction.requires_grad_()}, {task: nothing})[task]
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
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: dtype if enabled else torch.float32)
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert data.autocast(torch.device("cuda")) == expected
        assert data.autocast(torch.device("cpu")) == torch.float32


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


@pytest.fixture
def judged(mini):
    """An untrained model, and the validation split that it judges."""
    config = ase.Config(image=32, dim=12, depth=1, heads=2, head_dim=8, experts=3, topk=1, rank=2)
    return ase.ASE(config), data.PascalContext(mini, "val", 32)


def test_each_image_is_judged_once_and_workers_change_no_bit(judged, mini, monkeypatch):
    here = evaluate.accumulate(*judged, "half", torch.device("cpu"))
    metrics = evaluate.evaluate(*judged, "half")
    monkeypatch.setattr(data, "parallel", lambda function, jobs, total, what: data._pooled(function, jobs))
    np.testing.assert_equal(evaluate.accumulate(*judged, "half", torch.device("cpu")), here)
    (counts, of_constant), dataset = here, judged[1]
    assert metrics == {task: evaluate.metric_of(task).value(counts[task]) for task in TASKS}
    for task in ("semseg", "human_parts"):
        known = torch.cat([dataset[i][1][task].flatten() for i in range(7)])
        expected = known[known != IGNORE].bincount(minlength=TASKS[task].channels).tolist()
        assert counts[task][:, 2].tolist() == expected
        assert of_constant[task][:, 1].tolist() == [sum(expected)] + [0] * (len(expected) - 1)
    labels = [scipy.io.loadmat(data.find(mini, "labelmap", id))["LabelMap"] for id in dataset.ids]
    assert counts["edge"][0, 2] == sum(slow_thin(slow_seg2bmap(x)).sum() for x in labels)


def test_validation_losses_do_not_depend_on_the_batch(judged):
    settings = [argparse.Namespace(batch=batch, mean_std="half", workers=0) for batch in (1, 3, 7)]
    losses, routings = zip(*(train.validate(*judged, args) for args in settings))
    for other in (1, 2):
        torch.testing.assert_close([*routings[other]], [*routings[0]], rtol=1e-4, atol=1e-5)
        for task in set(TASKS) - {"sal"}:  # saliency's weights are those of the batch
            assert losses[other][task] == pytest.approx(losses[0][task], rel=1e-4)


def test_weight_decay_acts_on_matrices_alone():
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


def test_the_learning_rate_warms_up_and_then_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 3) for step in range(100)]
    np.testing.assert_allclose(rates[:5], [0.6, 1.2, 1.8, 2.4, 3])
    np.testing.assert_allclose(rates[5:], 3 * np.cos(np.arange(95) / 95 * np.pi / 2) ** 2, atol=1e-12)


def test_four_steps_are_those_written_out(mini, tmp_path):
    """Losses times 1, 2, 5, 50, 10, less 3 times the mutual information; the gradient cut to a norm of 10;
    AdamW with decay 0.01 of the matrices; a rate of 0.01 in step 1, which is the warm-up, and a cosine from
    there; an order and warps of each epoch's own, noise of each step's own."""
    train.main(flags(mini, tmp_path / "run", "--epochs 2 --batch 6 --mi 3 --lr 0.01 --seed 5"))
    torch.manual_seed(5)
    model = ase.ASE(evaluate.open_run(tmp_path / "run").config)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in learned.items()}
    norms, batches = [], []
    for step, rate in enumerate((0.01, 0.01, 0.0075, 0.0025)):
        if not batches:
            order, warps = train.shuffle(13, step // 2, 5)
            batches = [order[:6], order[6:12]]
            canvases = data.PascalContext(mini, "train", 32).canvases(batches[:], torch.device("cpu"))
        torch.manual_seed(5 * 1_000_003 + step)
        batch = data.warp(*next(canvases), 32, "imagenet", target_to_source=warps[batches.pop(0)])
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
    assert max(norms) > 10 > min(norms), norms
    found = weights_of(tmp_path / "run")
    errors = torch.cat([(found[name] - p.detach()).abs().flatten() for name, p in learned.items()])
    # Adam enlarges the rounding of the few gradients that are nearly zero
    assert errors.quantile(0.99) < 1e-5 and errors.max() < 0.005, (errors.quantile(0.99), errors.max())


def test_four_images_are_learned_by_heart(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "random_warps", lambda number, _: torch.eye(2).expand(number, 2, 2))
    demo.make_demo(tmp_path / "four", 4, 1, 48, seed=5)  # people in two
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
    (order, warps), *others = (train.shuffle(101, *which) for which in ((0, 3), (1, 3), (0, 4)))
    assert sorted(order.tolist()) == list(range(101))
    for other, other_warps in others:
        assert (other != order).any() and (other_warps != warps).any()


def test_pretrained_weights_stay_or_are_trained_at_a_tenth_of_the_rate(mini, tmp_path):
    """The first step of Adam moves each weight by the rate, 0.01, or less where its gradient is nearly 0."""
    tiny = backbone_of(ase.Config(**ase.BACKBONES["vit_tiny"] | {"image": 32}))
    torch.save(tiny, tmp_path / "vit.pt")
    for lora, expected in ((4, 0), (0, 0.001)):
        more = f"--epochs 1 --batch 13 --lr 0.01 --lora {lora} --weights {tmp_path / 'vit.pt'}"
        train.main(flags(mini, tmp_path / f"run-{lora}", more))
        after = weights_of(tmp_path / f"run-{lora}")
        moved = max((after[name] - x).abs().max().item() for name, x in tiny.items())
        assert moved == pytest.approx(expected, rel=0.05)


def test_a_first_training_makes_the_demo_and_starts_from_the_backbone_beside_it(tmp_path, monkeypatch):
    make = demo.make_demo
    monkeypatch.setattr(demo, "make_demo", lambda root: make(root, 6, 2, 48))
    monkeypatch.chdir(tmp_path)
    argv = flags("demo", "run", "--epochs 1")
    del argv[argv.index("--weights"):argv.index("--weights") + 2]
    train.main(argv)
    shipped, after = ase.load(train.OWN_BACKBONE), weights_of(Path("run"))
    assert shipped.keys() == vit_names(4) and train.OWN_BACKBONE.stat().st_size < 4e6
    assert all(torch.equal(after[name], x.float()) for name, x in shipped.items() if name != "pos_embed")
    assert len(data.read_ids("demo", "train")) == 6


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


@pytest.mark.parametrize("flag", ["--compile", "--checkpointing", "--workers 2"])
def test_compiling_recomputing_and_reading_ahead_change_no_weight(mini, trained, tmp_path, monkeypatch, flag):
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


def test_the_log_holds_steps_and_epochs_and_what_the_routers_do_in_use(mini, trained):
    """Their means are over the validation images, taken here one at a time, and without noise."""
    steps, epochs = logged(trained, "step"), logged(trained, "epoch")
    assert [r["step"] for r in steps] == [3, 6] and [r["epoch"] for r in epochs] == [1, 2]
    for losses in [r["losses"] for r in steps] + [r["val"] for r in epochs]:
        assert set(losses) == set(TASKS) and all(map(math.isfinite, losses.values()))
    cpu = torch.device("cpu")
    model = evaluate.load_model(evaluate.open_run(trained), cpu)
    canvases = data.PascalContext(mini, "val", 32).canvases([[i] for i in range(7)], cpu)
    routings = [model(data.warp(*canvas, 32, "imagenet").images)[1] for canvas in canvases]
    probs, gates = (torch.stack(x).mean(0).detach().numpy() for x in zip(*routings))
    np.testing.assert_allclose(epochs[-1]["gates"], gates, atol=1e-5)
    np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-5)  # joint gates
    information = (probs * np.log(probs / probs.mean(1, keepdims=True))).sum((1, 2)) / 5
    np.testing.assert_allclose(epochs[-1]["mutual_information"], information, atol=1e-5)


@pytest.mark.parametrize("extend", [False, True])
def test_a_killed_training_resumes_to_the_same_bits(mini, tmp_path, extend):
    """Killed when the second checkpoint is written, but not yet in the place of the first. When it goes on,
    its data lie elsewhere; so does the run that it extends, which has changed; its weights file is gone."""
    here, there = shutil.copytree(mini, tmp_path / "here"), tmp_path / "there"
    start, moved = tmp_path / "start", tmp_path / "moved"
    if extend:
        train.main(flags(here, start, "--epochs 1 --tasks sal"))
    else:
        torch.save(backbone_of(ase.Config(**ase.BACKBONES["vit_tiny"] | {"image": 32})), start)
    more = "--tasks edge --extend" if extend else "--weights"
    train.main(flags(here, tmp_path / "whole", f"{more} {start}"))
    script = ("import os, signal, sys, train\n"
              "replace = os.replace\n"
              "def killed(old, new):\n"
              "    if new.name == 'checkpoint.pt' and new.exists():\n"
              "        os.kill(os.getpid(), signal.SIGKILL)\n"
              "    replace(old, new)\n"
              "os.replace = killed\n"
              "train.main()\n")
    run = tmp_path / "run"
    number = str(torch.get_num_threads())
    threads = {f"{library}_NUM_THREADS": number for library in ("OMP", "MKL", "OPENBLAS")}
    argv = [sys.executable, "-c", script, *flags(here, run, f"{more} {start}")]
    # another number of threads rounds differently
    code = subprocess.call(argv, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | threads)
    assert code == -signal.SIGKILL and evaluate.load_checkpoint(run)["epoch"] == 1
    assert list(run.glob(".*.tmp")) and len(logged(run, "epoch")) == 2
    here.rename(there)
    if extend:
        state = evaluate.load_checkpoint(start)
        state["model"] = {name: 0 * p for name, p in state["model"].items()}
        torch.save(state, start / "checkpoint.pt")
    start.rename(moved)
    train.main(flags(there, run, f"{more} {moved if extend else start}"))
    found, expected = weights_of(run), weights_of(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert [r["step"] for r in logged(run, "step")] == [3, 6] and not list(run.glob(".*.tmp"))


def test_a_finished_run_says_so_and_what_is_not_its_own_is_named(trained, mini, broken, fails, capsys):
    for root in (mini, broken):
        assert not train.main(flags(root, trained)) and "is finished" in capsys.readouterr().out
    for flag in ("--rank 3", "--seed 5", "--gating fixed", "--lr 0.5", "--tasks sal"):
        assert f"a run with {flag.split()[0][2:]} " in fails(train.main, *flags(mini, trained, flag))
    for name in ("demo.json", "ImageSets/Context/train.txt", "ImageSets/Context/val.txt"):
        good = (broken / name).read_text()
        seed = json.dumps(json.loads(good) | {"seed": 1}) if name == "demo.json" else None
        (broken / name).write_text(seed or good[good.index("\n"):])
        assert "a run with dataset " in fails(train.main, *flags(broken, trained))
        (broken / name).write_text(good)


def test_a_run_that_failed_before_its_first_checkpoint_blocks_no_other(broken, tmp_path, fails):
    run, source = tmp_path / "run", data.find(broken, "labelmap", "2008_000001")
    good = source.read_bytes()
    source.write_bytes(b"")
    fails(train.main, *flags(broken, run))
    assert settings_of(run)["seed"] == 0
    source.write_bytes(good)
    (run / ".checkpoint.pt.999999999.tmp").write_text("{")  # left by a kill
    (run / "log.jsonl").write_bytes(b'{"kind": "step", "los\n\xff\xfe\x00\n{"kind"')
    train.main(flags(broken, run, "--seed 3 --epochs 1"))
    assert settings_of(run)["seed"] == 3 and not list(run.glob(".*.tmp"))
    assert [r["kind"] for r in evaluate.read_log(run)] == ["step", "epoch"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("no run")
    assert "thesis.tex" in fails(train.main, *flags(broken, tmp_path / "other"))


def test_a_loss_that_is_not_finite_ends_the_training(mini, tmp_path, fails, monkeypatch):
    monkeypatch.setitem(evaluate.LOSSES, "edge_bce", lambda p, *_: p.sum() * math.nan)
    assert "edge loss is not finite at " in fails(train.main, *flags(mini, tmp_path / "run", "--batch 13"))
    assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("more", ["", "--experts 0", "--gating fixed --noise 0"])
def test_a_task_is_added_to_a_trained_model_and_changes_nothing_else(mini, tmp_path, table, more):
    """The other tasks' parameters to the bit and predictions to rounding; its own loss has weight 1."""
    base, run = tmp_path / "base", tmp_path / "run"
    train.main(flags(mini, base, "--epochs 1 --tasks semseg,edge " + more))
    written = tree(base)
    train.main(f"--extend {base} --tasks normals --out {run} --epochs 2 --batch 13 --device cpu".split())
    old, new, config = weights_of(base), weights_of(run), evaluate.open_run(run).config
    assert tree(base) == written and list(config.tasks) == ["semseg", "edge", "normals"]
    assert all((new[name] == p).all() for name, p in old.items())
    torch.manual_seed(0)
    alone = ase.ASE(evaluate.open_run(run, "normals").config)
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
        arrays = data.PascalContext(mini, "train", 32, alone.config.tasks).canvas(order)
        canvas = map(torch.from_numpy, arrays)
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
    train.main(f"--extend {run} --tasks sal --out {tmp_path}/more --epochs 1 --device cpu".split())
    assert list(evaluate.open_run(tmp_path / "more").config.tasks) == ["semseg", "sal", "edge", "normals"]


def test_what_cannot_extend_a_run_is_one_line(mini, broken, tmp_path, fails):
    base, out = tmp_path / "base", tmp_path / "run"
    train.main(flags(mini, base, "--epochs 1 --tasks sal"))
    shutil.rmtree(broken / "pascal-context")
    written = tree(base)

    def told(more):
        return fails(train.main, "--extend", base, "--out", out, "--device", "cpu", *more.split())

    assert "'sal' is unknown or named twice; expected some of semseg,human_parts,edge" in told("--tasks sal")
    for more, has in (("--rank 3", "rank 2"), ("--experts 0", "experts 4"), ("--mean-std half", "imagenet"),
                      ("--backbone vit_small", "vit_tiny"), ("--size 64", "size 32"),
                      ("--data nowhere", "no .*nowhere"), (f"--out {base}", "name another folder"),
                      (f"--data {broken}", "has no pascal-context")):
        assert re.search(has, told(f"--tasks edge {more}")), more
    assert "no config.json" in told(f"--tasks edge --extend {broken}")
    assert tree(base) == written and not out.exists()
    settings_of(base, epochs=2)
    assert "1 of its 2 epochs" in told("--tasks edge")


def test_a_run_is_judged_drawn_and_kept_and_judged_again_when_it_is_named(finished, broken, table):
    """A data set is known by its lists: a copy is the same one, also when labels in it are corrected."""
    told = table(finished)
    assert "4/2/1/2" in told and "constant" in told and "baseline: none for this data set" in told
    assert told.index("constant") < told.index(f"kept in {finished}: metrics.json")
    result = result_of(finished / "metrics.json")
    assert list(result)[0] == "metrics" and set(result["metrics"]) == set(TASKS) and result["epoch"] == 2
    assert all(drawn(finished / name) for name in evaluate.PICTURES)
    matched, predicted, truth = np.array(result["edge"]["counts"]).T
    precision, recall = matched / np.maximum(predicted, 1), matched / truth
    best = max(2 * p * r / (p + r) for p, r in zip(precision, recall) if p + r)
    assert len(matched) == len(result["edge"]["thresholds"]) == 101
    assert result["metrics"]["edge"] == pytest.approx(100 * best)

    for id in data.read_ids(broken, "val"):  # nobody is in them any more
        anno = struct([(id, np.zeros((1, 0), object))], "xy")
        scipy.io.savemat(broken / f"human_parts/{id}.mat", {"anno": anno})
    told = table(finished, "--data", broken, "--baseline", "survey")
    row = next(line.split() for line in told.splitlines() if "4/2/1/2" in line)
    assert row[3] == "–" == row[7]  # a metric without truth, and so no Δm
    again = result_of(finished / "metrics.json")
    assert again["metrics"]["human_parts"] is None is again["constant"]["human_parts"]
    assert again["metrics"] | {"human_parts": 0} == result["metrics"] | {"human_parts": 0}


def test_what_is_not_the_default_protocol_on_a_runs_own_data_is_printed_and_not_kept(
        finished, broken, tmp_path, table, monkeypatch):
    table(finished)
    whole, before = result_of(finished / "metrics.json"), tree(finished)
    ids, passes, features = data.read_ids(broken, "val"), [], ase.ASE.features

    def counted(model, images):
        tokens, routing = features(model, images)
        passes.append(len(tokens))
        return tokens, routing

    monkeypatch.setattr(ase.ASE, "features", counted)
    told = table(finished, "--tasks", "edge,semseg")
    row = next(line.split() for line in told.splitlines() if "4/2/1/2" in line)
    assert passes == 7 * [2] and [row[i] for i in (3, 4, 6, 7)] == ["–", "–", "–", "–"]
    for text, task in ((row[2], "semseg"), (row[5], "edge")):
        assert float(text) == pytest.approx(whole["metrics"][task], abs=0.02)
    (tmp_path / "ids.txt").write_text("\n".join(ids[:3] + ids[:1]))
    (broken / "ImageSets/Context/val.txt").write_text("\n".join(ids[:4]))
    for more, images in ((["--no-nms"], 7), (["--thresholds", 99], 7), (["--ids", tmp_path / "ids.txt"], 3),
                         (["--data", broken], 4)):
        passes.clear()
        told = table(finished, *more, "--baseline", "survey")
        assert passes == images * [5] and f"\n{images} images at native size" in told
        assert ("not the run's own data" in told) == ("--data" in more)
        assert ("none under this protocol" in told) == ("--data" not in more)
    assert tree(finished) == before


@pytest.mark.parametrize("several", [False, True])
def test_the_table_is_printed_also_where_nothing_can_be_written(finished, tmp_path, capsys, several):
    (finished / "metrics.json").mkdir()
    runs = [finished, shutil.copytree(finished, tmp_path / "other")][:1 + several]
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*map(str, runs), "--device", "cpu"])
    told, error = capsys.readouterr()
    assert stop.value.code == 2 and "4/2/1/2" in told and error.count("\n") == 1
    assert "metrics.json" in error and "Is a directory" in error


@pytest.fixture
def counting(monkeypatch):
    """No image is judged, the sums are made up, nothing is drawn: a list of the numbers of images that would
    have been judged."""
    judged = []

    def judge(model, dataset, mean_std, device, protocol=evaluate.Protocol()):
        judged.append(len(dataset))
        sums = {"semseg": np.ones((21, 3), int), "human_parts": np.ones((7, 3), int),
                "sal": np.full((15, 3), 1.0), "edge": np.ones((len(protocol.levels()), 3), int),
                "normals": np.array([20.0, 1])}
        sums["semseg"][[4, 7, 20]] = 0
        return sums, sums

    monkeypatch.setattr(evaluate, "accumulate", judge)
    monkeypatch.setattr(evaluate, "draw_run", lambda *args: None)
    return judged


def test_of_several_runs_what_is_missing_or_older_than_its_checkpoint_is_judged(
        finished, tmp_path, table, counting, fails):
    """Unfinished runs are left out; under another protocol all are judged, a baseline's runs, too."""
    runs = [finished, *(shutil.copytree(finished, tmp_path / name) for name in ("b", "c", "d"))]
    settings_of(runs[2], epochs=3)
    (runs[3] / "checkpoint.pt").unlink()

    def judged(*argv):
        counting.clear()
        told = table(*runs, *argv)
        for run, epochs in ((runs[2], "2 of its 3"), (runs[3], "0 of its 2")):
            assert f"left out: {run} has trained for {epochs} epochs" in told
        assert "18 of 21 classes" in told and f"{tmp_path.name}" in told
        return len(counting), told

    assert judged()[0] == 2 and judged()[0] == 0
    assert "none of these runs is finished" in fails(evaluate.main, *runs[2:])
    os.utime(runs[1] / "checkpoint.pt", (2e9, 2e9))
    assert judged()[0] == 1
    os.utime(runs[1] / "metrics.json", (2e9, 2e9))
    count, told = judged("--baseline", runs[0])
    assert count == 0 and "+0.00 ±0.00" in told
    count, told = judged("--baseline", runs[0], "--no-nms")
    assert count == 3 and "+0.00 ±0.00" in told
    before = [tree(run) for run in runs]
    assert judged("--thresholds", 99, "--tasks", "sal")[0] == 2 and [tree(run) for run in runs] == before


def test_runs_that_differ_in_the_seed_alone_are_one_row(finished, tmp_path, table):
    """Mean ± standard deviation of each metric and of Δm; where files lie does not tell runs apart."""
    def add(name, sal, **changes):
        run = shutil.copytree(finished, tmp_path / name)
        settings_of(run, **changes)
        metrics = evaluate.BASELINES["resnet18"] | {"sal": sal, "normals": 20.0}
        result = {"metrics": metrics, "constant": {"sal": 5.0}, "notes": [], "epoch": 2, "baseline": None}
        (run / "metrics.json").write_text(json.dumps(result))
        return run

    runs = [add("old-1", 10.0, seed=1), add("old-2", 12.0, seed=2, data="/gone"),
            add("old-3", 17.0, seed=3, weights="/gone"), add("new", 30.0, mi=1.0),
            add("else-1", 40.0, dataset="another")]
    told = table(*runs, "--baseline", "resnet18")
    rows = [line for line in told.splitlines() if "4/2/1/2" in line]
    assert [row.split()[0] for row in rows] == ["old", str(runs[3]), str(runs[4])]
    # sal: the mean of 10, 12, 17 is 13, their deviation √((9 + 1 + 16) / 2) = 3.61
    gains = [20 * ((sal - 63.2) / 63.2 - 4.6 / 15.4) for sal in (10, 12, 17)]
    spread = math.sqrt(sum((gain - sum(gains) / 3) ** 2 for gain in gains) / 2)
    gain = f"{sum(gains) / 3:+.2f} ±{spread:.2f}"
    assert rows[0].startswith("old ×3") and " 13.00 ±3.61 " in rows[0] and f" 20.00 ±0.00  {gain} " in rows[0]
    assert f"{20 * ((40 - 63.2) / 63.2 - 4.6 / 15.4):+.2f}" in rows[2].split()
    several = [add(f"old-{n}", 10.0, seed=n, mi=n // 2) for n in range(4, 10)]
    assert table(*several, f"{several[0]}/").count("old ×2 ") == 3
    # runs named as the baseline: theirs is the mean of what they have
    assert f"{20 * (30 - 13) / 13:+.2f}" in table(*runs[3:], "--baseline", *runs[:3]).split()


def test_the_demos_baseline_is_the_mean_of_the_studys_single_task_models(tmp_path):
    alone = study.read_lines()["alone", 0].values()
    for task, value in evaluate.BASELINES["demo"].items():
        assert value == pytest.approx(np.mean([run[task] for run in alone]), abs=0.006) and len(alone) == 4
    (tmp_path / "ImageSets/Context").mkdir(parents=True)
    for images, name in ((5105, "resnet18"), (5104, None)):
        (tmp_path / "ImageSets/Context/val.txt").write_text("\n".join(map(str, range(images))))
        assert evaluate.default_baseline(tmp_path) == name
    for made, name in ((data.DEMO | {"seed": 0}, "demo"), (data.DEMO | {"seed": 1}, None), ({}, None)):
        data.write_json(tmp_path / "demo.json", made)
        assert evaluate.default_baseline(tmp_path) == name


def test_labels_that_differ_by_256_have_an_edge(broken):
    labels((36, 48), np.where(np.arange(48) < 24, 3, 259))(data.find(broken, "labelmap", "2008_000001"))
    image, truth = evaluate.read_truth(broken, "2008_000001", ["edge"])
    assert image.shape == (3, 36, 48) and truth["edge"][:35].sum(1).tolist() == [1] * 35


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_photo_is_drawn_as_its_camera_was_held_and_transparency_as_white(
        finished, tmp_path, table, monkeypatch, mode):
    draw, seen, exif = evaluate.draw_predictions, [], Image.Exif()
    grey = rng.integers(0, 256, (31, 53), np.uint8)
    photo = Image.fromarray(grey).convert(mode)
    if mode == "RGBA":
        photo.putalpha(Image.fromarray(np.uint8(255 * (grey < 128))))
        grey = np.where(grey < 128, grey, 255)
    exif[274] = 6
    photo.save(tmp_path / "a.png", exif=exif)
    monkeypatch.setattr(evaluate, "draw_predictions", lambda *argv: (seen.append(argv[1][0][0]), draw(*argv)))
    table(finished, tmp_path / "a.png")
    assert (seen[0] == np.rot90(grey, -1)[..., None]).all() and drawn(finished / "a.png")


def test_no_photo_is_replaced_by_a_prediction_nor_a_prediction_by_another(finished, tmp_path, fails):
    photos = [finished / "me.png", *(tmp_path / name for name in ("curves.png", "a.png", "a.jpg"))]
    for path in photos:
        Image.new("RGB", (32, 32)).save(path)
    before = tree(finished)
    for photo in photos[:2]:
        assert "rename" in fails(evaluate.main, finished, photo, "--device", "cpu")
    assert "or one and different photos" in fails(evaluate.main, finished, *photos[2:])
    assert tree(finished) == before


@pytest.mark.parametrize("wrong, told", [
    ("--topk 9", "topk is 9: expected 1 to 3"), ("--shared 4", "expected 0 to 3"), ("--rank 0", "rank is 0"),
    ("--tasks semseg,depth", "'depth' is unknown"), ("--tasks sal,sal", "named twice"),
    ("--gating soft", "joint"), ("--backbone vit_huge", "vit_base"), ("--mean-std x", "imagenet"),
    ("--lr nan", "found 'nan', expected float, 1e-09 to"), ("--lr -1", "expected float, 1e-09 to"),
    ("--epochs 0", "expected int, 1 to"), ("--batch x", "found 'x'"), ("--batch 99", "at most the 13 images"),
    ("--seed 9999999999", "expected int, 0 to"), ("--mi -1", "expected float, 0 to"),
    ("--size 44", "multiple of the patch"), ("--weights no.pt", "no weights file no.pt"),
    ("--device tpu9", "no device tpu9"), ("--what", "--what"), ("--data nowhere", "nowhere")])
def test_bad_flags_of_train(mini, tmp_path, fails, wrong, told):
    assert told in fails(train.main, *flags(mini, tmp_path / "run", wrong))
    assert not (tmp_path / "run").exists()


def test_lists_and_folders_that_are_not_what_they_should_be(mini, broken, tmp_path, fails):
    train_list, val_list = (broken / f"ImageSets/Context/{split}.txt" for split in ("train", "val"))
    for content in (b"", b"../x\n", b"/etc/x\n", b"b\na\na\n", b"\xff\xfe"):
        train_list.write_bytes(content)
        assert f"cannot read {train_list}" in fails(train.main, *flags(broken, tmp_path / "run"))
    shutil.copy(mini / "ImageSets/Context/train.txt", train_list)
    val_list.unlink()
    (tmp_path / "file").write_text("x")
    for root, out, told in ((broken, "run", f"there is no {val_list}"), (mini.parent, "run", "there is no"),
                            (mini, "file", "File exists"), (mini, "file/run", "Not a directory")):
        assert told in fails(train.main, *flags(root, tmp_path / out))
    (broken / "demo.json").unlink()
    assert "--weights none" in fails(train.main, "--data", broken, "--out", tmp_path / "run", "--batch", 2)
    assert not (tmp_path / "run").exists()
    assert "there is no" in fails(data.main, tmp_path / "nowhere")
    assert "exists" in fails(data.main, mini, "--make", 3, 3)


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def picture(size, value, mode="L"):
    return lambda path: Image.new(mode, size, value).save(path)


def labels(shape, value):
    return lambda path: scipy.io.savemat(path, {"LabelMap": np.full(shape, value)})


@pytest.mark.parametrize("name, harm", [
    ("image", Path.unlink), ("image", cut), ("human_parts", Path.unlink), ("human_parts", cut),
    ("human_parts", labels((36, 48), 1)), ("labelmap", Path.unlink), ("labelmap", labels((48, 36), 1)),
    *(("labelmap", labels((36, 48), value)) for value in (460, -1, -1.0, math.nan, 2.5)),
    ("semseg", picture((48, 36), 21)), ("semseg", picture((47, 36), 1)),
    ("semseg", picture((48, 36), (0, 0, 128), "RGB")), ("normals", cut), ("sal", Path.unlink)])
def test_a_broken_file_is_named_by_the_check_and_by_train(broken, tmp_path, check, fails, name, harm):
    """What is missing before anything is made; what cannot be read when it is met, by a worker, too."""
    path, missing = data.find(broken, name, "2008_000001"), harm is Path.unlink
    harm(path)
    code, report = check()
    assert code == 1 and ("  missing: " if missing else f"  cannot read {path} (") in report
    spoilt = {"image": set(TASKS), "labelmap": {"edge", "normals"}}.get(name, {name})
    rest = ",".join(task for task in TASKS if task not in spoilt)
    assert (f"could start with --tasks {rest}\n" if rest else "no training could start") in report
    error = fails(train.main, *flags(broken, tmp_path / "run", "--workers 1" if harm is cut else ""))
    assert str(path.relative_to(broken)) in error and str(broken) in error
    assert (tmp_path / "run").exists() != missing and not (tmp_path / "run/checkpoint.pt").exists()


def test_a_copy_without_normals_and_saliency_serves_the_other_tasks(broken, tmp_path, check, table, fails):
    """The check says which; they are trained and judged without the files of the rest, and nothing is
    written into the data set."""
    shutil.rmtree(broken / "normals_distill")
    shutil.rmtree(broken / "sal_distill")
    before, (code, report) = tree(broken), check()
    assert code == 1 and "could start with --tasks semseg,human_parts,edge\n" in report
    assert drawn(Path("contact_broken.png"))
    train.main(flags(broken, tmp_path / "run", "--tasks semseg,human_parts,edge --epochs 1"))
    table(tmp_path / "run")
    assert list(result_of(tmp_path / "run/metrics.json")["metrics"]) == ["semseg", "human_parts", "edge"]
    assert tree(broken) == before


def test_bad_input_of_evaluate(finished, tmp_path, fails, counting):
    def told(*argv):
        return fails(evaluate.main, finished, *argv, "--device", "cpu")

    (tmp_path / "photo.jpg").write_text("no photo")
    (tmp_path / "ids.txt").write_text("2010_999999")
    for name in ("resnet99", tmp_path):
        assert f"{name} is no run folder" in told("--baseline", name)
        assert f"{name} is no run folder" in told(name)
    assert not counting  # before hours of judging
    assert "expected a photo" in told(tmp_path / "photo.jpg")
    assert "2010_999999" in told("--ids", tmp_path / "ids.txt")
    assert "'depth' is unknown" in told("--tasks", "depth")
    assert f"there is no {tmp_path / 'ImageSets'}" in told("--data", tmp_path)
    good = (finished / "config.json").read_bytes()
    settings_of(finished, data="gone")
    assert "there is no gone/" in told()
    for content in (good[:99], b"[]", b"\xff\xfe", b"{}"):
        (finished / "config.json").write_bytes(content)
        assert "config.json" in told() and "broken, or made by other code" in told()
    (finished / "config.json").write_bytes(good)
    cut(finished / "checkpoint.pt")
    assert f"cannot read {finished / 'checkpoint.pt'}" in told()
    torch.save({"model": {}}, finished / "checkpoint.pt")
    assert f"cannot read {finished / 'checkpoint.pt'}" in told()
    (finished / "checkpoint.pt").unlink()
    assert "no checkpoint" in told()


@pytest.mark.parametrize("error, told", [
    (BrokenProcessPool("killed"), "out of memory"), (MemoryError(), "--checkpointing"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch"), (data.UserError("a\nb"), "a b"),
    (OSError(28, "No space left on device", "run/x"), "run/x: No space left"),
    (None, "out of memory")])
def test_what_a_command_meets_ends_in_one_line(fails, error, told):
    def job(args):
        if error:
            raise error
        torch.empty(2 ** 48)

    assert told in fails(lambda argv: data.command(argparse.ArgumentParser(), job, argv))


def test_letters_that_an_encoding_lacks_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    data.command(argparse.ArgumentParser(), lambda args: print("Δm ↑ 1 °"), [])
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"?m ? 1 ?\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("where", ["pool", "loader"])
def test_ctrl_c_is_one_line_and_workers_end_with_their_parent(mini, tmp_path, where, sent):
    """While both workers have jobs of 0.1 s, or in a training. Ctrl-C goes to the workers, too; until the
    last of them has ended the output stays open."""
    script = ("import argparse, subprocess, data\n"
              "data.cores = lambda: 2\n"
              "def job(args):\n"
              "    jobs, seen = 200 * ['sleep 0.1; echo $PPID'], set()\n"
              "    for process in data.parallel(subprocess.getoutput, jobs, 200, 'wait'):\n"
              "        seen.add(process)\n"
              "        print(len(seen), 'at work', flush=True)\n"
              "data.command(argparse.ArgumentParser(), job)\n")
    training = ["train.py", *flags(mini, tmp_path / "run", "--epochs 9999 --workers 2")]
    argv, mark = (["-c", script], "2 at work") if where == "pool" else (training, "epoch")
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True,  # a group of its own
                               # a job in the background ignores Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not process.stdout.readline().startswith(mark):
        assert process.poll() is None
    began = time.monotonic()
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.kill()
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - began < 4
    if sent == signal.SIGINT:
        told = "\ninterrupted; the same command goes on or starts again\n"
        # torch may add a remark of its own where a loader's workers have just been started
        assert process.returncode == 130 and (told in error if where == "loader" else told == error)


def test_a_full_disk_or_ctrl_c_while_a_file_is_written_leaves_what_was_there(tmp_path):
    """torch.save makes a RuntimeError of either; here a file may have 100 kB."""
    class Interrupted(io.BytesIO):
        def write(self, _):
            raise KeyboardInterrupt

    (tmp_path / "x.pt").write_text("whole")
    state, limits = {"x": torch.zeros(10 ** 6)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            data.write_atomically(tmp_path / "x.pt", lambda file: torch.save(state, file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(tmp_path / "x.pt", lambda file: torch.save(state, Interrupted()))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_saliency_of_0_and_1_is_told_and_has_no_max_iou(finished, broken, check, table):
    for path in (broken / "sal_distill").glob("*.png"):
        picture(Image.open(path).size, 1)(path)
    assert "0% saliency: NOTHING IS SALIENT" in check()[1]
    told = table(finished, "--data", broken)
    assert next(line.split() for line in told.splitlines() if "4/2/1/2" in line)[4] == "–"


def test_a_normal_shorter_than_half_is_no_truth():
    planes = torch.full((1, 8, 1, 5), 128, dtype=torch.uint8)                 # image, normals, labelmap
    planes[0, 3, 0] = torch.tensor([127, 128, 180, 192, 255])
    planes[0, 6:] = torch.tensor([158, 0]).view(2, 1, 1)
    truth = data.targets(planes, ["normals"])["normals"]
    assert truth.norm(dim=1).round(decimals=5).tolist() == [[[0, 0, 0, 1, 1]]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_read_with_any_mark_and_line_ends(tmp_path, encoding):
    path = tmp_path / data.LISTS.format("val")
    path.parent.mkdir(parents=True)
    path.write_bytes("2008_1\r\n2008_2\r\n".encode(encoding))
    ids = ["2008_1", "2008_2"]
    assert data.read_ids(tmp_path, "val") == ids == evaluate.select_ids(ids[::-1], path)


def test_weights_decide_the_shape_of_the_model(mini, tmp_path, fails, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without torchrun's LOCAL_RANK it is one process all the same
    weights, out = tmp_path / "weights", tmp_path / "run"
    shape = dict(image=14, patch=7, dim=64, depth=2, heads=1, registers=2, head_dim=256)
    source = randomise(ase.ASE(ase.Config(**shape, experts=0))).float()
    torch.save({name: p for name, p in source.state_dict().items() if ase.part(name) == "backbone"}, weights)
    argv = [*flags(mini, out, "--epochs 1 --tasks sal --weights"), str(weights), "--size", "28"]
    error = fails(train.main, *argv, "--backbone", "vit_tiny")
    assert "the weights have width 64, 2 blocks, patch 7" in error
    train.main([*argv, "--heads", "2"])
    told = capsys.readouterr().out
    assert "2 attention heads assumed, position embeddings resized from 2×2 to 4×4" in told
    assert "normalised for them as imagenet" in told
    assert settings_of(out)["model"] | shape | {"image": 28, "heads": 2} == settings_of(out)["model"]
    weights.unlink()
    train.main([*argv, "--heads", "2"])  # the checkpoint has it all
    assert "is finished" in capsys.readouterr().out
    assert "heads 2, not 1" in fails(train.main, *argv, "--heads", "1")
    evaluate.main([str(out), "--device", "cpu"])
    assert list(result_of(out / "metrics.json")["metrics"]) == ["sal"]


def test_pictures_are_spread_over_the_split_and_classes_are_told(finished, mini, monkeypatch):
    run = evaluate.open_run(finished)
    images = {id: evaluate.read_truth(mini, id, list(TASKS)) for id in data.read_ids(mini, "val")}
    image, truth = next(iter(images.values()))
    many = {f"{n:02}": (image, truth | {"sal": truth["sal"] * 0 + (255 if n % 3 else 0)}) for n in range(40)}
    monkeypatch.setattr(evaluate, "read_truth", lambda root, id, tasks: many[id])
    shown = []
    monkeypatch.setattr(evaluate, "draw_predictions", lambda path, samples: shown.extend(samples))
    dataset = data.PascalContext(mini, "val", 32)
    dataset.ids = list(many)
    evaluate.draw_run(run, evaluate.load_model(run, "cpu"), dataset, torch.device("cpu"))
    found = [next(id for id, pair in many.items() if pair[1] is sample[1]) for sample in shown]
    assert found == ["00", "06", "12", "18", "24", "30"]  # of those with saliency, which are every third
    by_class = evaluate.iou_by_class("human_parts", np.array([[3, 4, 5], [0, 2, 0]] + 5 * [[0, 0, 0]]))
    assert list(by_class) == list(data.PART_CLASSES) and by_class["background"] == 50
    assert by_class["head"] == 0 and by_class["torso"] is None


def test_a_photo_with_malformed_exif_is_drawn_and_a_broken_one_named(finished, tmp_path, fails):
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    pixels.save(tmp_path / "odd.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff")
    (tmp_path / "cut.jpg").write_bytes(b"no photo")
    error = fails(evaluate.main, finished, tmp_path / "cut.jpg", tmp_path / "odd.jpg", "--device", "cpu")
    assert "cut.jpg" in error and "odd.jpg" not in error and drawn(finished / "odd.png")


# ------------------------------------------------------------------------------------------- assets/study.py

def test_an_effect_is_found_where_it_was_planted_and_a_null_is_not():
    x = np.random.default_rng(0).normal(0, 0.3, (4, 3, 9, 6))  # methods, N, seeds, metrics and Δm
    x[1::2] += 0.7  # control and ASE
    methods, sizes, numbers = ("vanilla", "control", "naive", "ASE"), (16, 32, 64), (*TASKS, "Δm")
    rows = {(method, n): {seed: dict(zip(numbers, x[i, j, seed])) for seed in range(9)}
            for i, method in enumerate(methods) for j, n in enumerate(sizes)}
    for name, signs, answer in (("gates that sum to 1", (-1, 1, -1, 1), "yes"),
                                ("shared experts", (-1, -1, 1, 1), "open")):
        effect = np.tensordot(signs, x, 1) / 2                               # (N, seeds, numbers)
        late = np.concatenate([effect[0, 4:, 5], effect[1, 8:, 5], effect[2, 4:, 5]])
        for new, values in ((False, effect[..., 5].ravel()), (True, late)):
            low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval()
            mean, half, count = study.interval(study.compare(rows, name, new))
            assert (mean - half, mean + half, count) == pytest.approx((low, high, len(values)))
        assert study.claim(rows, name, "", {name: 1})[3:] == ("27 (11)", answer)
        assert study.claim(rows, name, "", {name: -1}, 0.5)[-1] == "no"
        seeds = effect.mean(0)[:, :5]
        reached = [(scipy.stats.ttest_1samp(seeds * np.array(flips)[:, None], 0).statistic ** 2).sum()
                   for flips in itertools.product((1, -1), repeat=9)]
        p, least = study.joint(rows, study.EFFECTS[name])
        assert p == np.mean(np.array(reached) > reached[0] - 1e-6) and (p < 0.05) == (answer == "yes")
        assert least == 2 / 512
    found, free = study.variance(rows, "ASE", False)
    assert free == 24 and found == pytest.approx(x[3, ..., 5].var(-1, ddof=1).mean())
    # one new block decides nothing; a trade: all four sides; a seed's blocks are a block against MTL-ViT
    part = {row: runs for row, runs in rows.items() if row[1] == 32}
    assert study.claim(part, "", "", {"ASE - vanilla": 1})[3:] == ("9 (1)", "yes")
    rows["MTL-ViT", 0] = {4: dict.fromkeys(numbers, 50), 6: dict.fromkeys(numbers, 51)}
    (_, first), (_, second) = study.compare(rows, "sal - MTL-ViT's", True).items()
    assert (first, second) == pytest.approx(x[:, ::2, [4, 6], 2].mean((0, 1)) - (50, 51))
    sides = {f"{task} - MTL-ViT's": side for task, side in zip(TASKS, (-1, 1, 1, 1))}
    assert study.claim(rows, "", "", sides)[3:] == ("2 (2)", "a trade")
    assert study.claim(rows, "", "", sides | {"sal - MTL-ViT's": -1})[-1] == "yes; no; yes; no"


def test_study_md_and_readme_tell_what_the_study_prints(capsys):
    assert not study.main([])
    printed = capsys.readouterr().out
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("assets/study.md", "README.md"))
    assert page[page.index("claim  "):page.index("\n## ")].strip() in printed and len(page.split()) <= 1400
    results = readme[readme.index("## Results"):].split("All of it")[0]
    for text in (page[page.index("\n## "):page.index("## Plan")], results):
        text = text.replace("−", "-")
        numbers = re.findall(r"(?<![\d.])[+-]?\b\d+\.\d+\b(?!\.\d)", text)  # no version: it has two dots
        pairs = re.findall(r"[+-]\d+\.\d+°? ±\d+\.\d+", text)
        assert len(numbers) > 5 and len(pairs) > 2 and "?" not in text
        assert all(re.search(rf"(?<![\d.]){re.escape(x.lstrip('+-'))}(?!\d)", printed) for x in numbers)
        assert all(pair.replace("°", "") in printed for pair in pairs)
    lines = map(json.loads, (ROOT / "assets/study.jsonl").read_text().splitlines())
    gains = {x["run"]: evaluate.delta_m((x.get("result") or x)["metrics"], evaluate.BASELINES["demo"])
             for x in lines if re.match("(ase|vanilla)-[136]", x["run"]) and "images" not in x}
    pairs = [gains[name] - gains[name.replace("ase", "vanilla")] for name in gains if name[0] == "a"]
    low, high = scipy.stats.ttest_1samp(pairs, 0).confidence_interval()
    assert f"| {np.mean(pairs):+.2f} ±{(high - low) / 2:.2f} (" in printed


def test_a_run_becomes_a_line_of_the_study(finished, mini, table):
    table(finished)
    line, run = study.line_of(finished), evaluate.open_run(finished)
    assert line["metrics"] == result_of(finished / "metrics.json")["metrics"] and len(line["val"]) == 2
    assert json.loads(json.dumps(line)) == line and line["settings"]["data"] == "mini"
    model, dataset = evaluate.load_model(run, "cpu"), data.PascalContext(mini, "train", 32)
    batch = data.warp(*map(torch.from_numpy, dataset.canvas(range(13))), 32, "imagenet")
    losses = evaluate.losses(model(batch.images)[0], batch.targets)
    for part, key, cut in (("LoRA", ".lora_", slice(None)), ("shared experts", ".experts.", slice(1)),
                           ("sparse experts", ".experts.", slice(1, None))):
        chosen = [p for name, p in model.named_parameters() if key in name and "router" not in name]
        gradients = [torch.autograd.grad(loss, chosen, retain_graph=True) for loss in losses.values()]
        vectors = [torch.cat([x[cut].flatten() for x in of_task]).double() for of_task in gradients]
        cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(vectors, 2)]
        expected = [np.mean(np.array(cosines) < 0), np.mean(cosines)]
        assert line["conflict"][part] == pytest.approx(expected, abs=1e-5)
    (finished / "lines").write_text(2 * (json.dumps(line) + "\n"))
    with pytest.raises(data.UserError, match="is there twice"):
        study.read_lines(finished / "lines")
    val = data.PascalContext(mini, "val", 32)
    batch = data.warp(*map(torch.from_numpy, val.canvas(range(7))), 32, "imagenet")
    mass = evaluate.gates_of(model, batch.images)[..., :1].sum(-1)           # (layers, T, B, P)
    for name, pixels in (("edge", batch.targets["edge"] == 1), ("object", batch.targets["semseg"] % 255 > 0)):
        there = F.max_pool2d(pixels[:, None].float(), 8).flatten() > 0
        expected = [[[row[there].mean().item(), row[~there].mean().item()] for row in layer.flatten(1)]
                    for layer in mass]
        np.testing.assert_allclose(line["where"][name], expected, atol=1e-5)
    for block in model.blocks:  # an update of three times the FFN's output
        block.experts.forward = lambda h, block=block, forward=block.experts.forward: (
            3 * block.mlp.forward(h), *forward(h)[1:])
    assert line["scale"] > 0 and study.scale(model, run, val) == pytest.approx(3)


# ---------------------------------------------------------- worked changes, of README and assets/recipes.md

def changed(tmp_path, page, number, code):
    """Run `code` with the modules changed by a page's diff of this number: each hunk's old lines occur once.

    Returns the metrics of the run in "run", where the code judges one.
    """
    (tmp_path / "assets").mkdir(exist_ok=True)
    for name in ("ase.py", "data.py", "evaluate.py", "train.py", "assets/demo.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    diff = (ROOT / page).read_text(encoding="utf-8").split("```diff\n")[1 + number].split("```")[0]
    for part in diff.split("--- ")[1:]:
        name, _, hunks = part.partition("\n")
        text = (tmp_path / name).read_text(encoding="utf-8")
        for hunk in hunks.split("@@\n"):
            lines = hunk.splitlines()
            old, new = ("".join(line[1:] + "\n" for line in lines if line[0] != sign) for sign in "+-")
            assert text.count(old) == 1, f"{name} has {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
    start = "import torch, ase, data, evaluate, train\nfrom assets import demo\n"
    subprocess.run([sys.executable, "-c", start + code], check=True, cwd=tmp_path,
                   env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL)
    if "evaluate.main" in code:
        assert drawn(tmp_path / "run/predictions.png")
        return result_of(tmp_path / "run/metrics.json")["metrics"]


def judging(root, more=""):
    """The code of a short run that is judged."""
    argv = flags(root, "run", "--epochs 1 " + more)
    return f"train.main({argv})\nevaluate.main(['run', '--device', 'cpu'])\n"


def test_readmes_gate_opens_as_many_experts_as_hold_half_of_the_probability(mini, tmp_path):
    argv = flags(mini, "run", "--epochs 1 --gating topp --tasks sal")
    changed(tmp_path, "README.md", 0, f"train.main({argv})\n"
            "logits = torch.tensor([[9.0, 5.0, 1.0, 2.0, 0.0], [9.0, 1.0, 1.0, 1.0, 1.0]])\n"
            "gates = ase.gate(logits, 1, 1, 'topp')\n"
            "assert (gates > 0).sum(-1).tolist() == [2, 3], gates\n"
            "torch.testing.assert_close(gates.sum(-1), torch.ones(2))\n")


def test_a_sixth_task_is_learned_and_judged(tmp_path):
    metrics = changed(tmp_path, "assets/recipes.md", 0, "demo.make_demo('deep', 5, 3, 48)\n"
                      f"train.main({flags('deep', 'base', '--epochs 1 --tasks sal,edge')})\n"
                      + judging("deep", "--extend base --tasks depth"))
    assert set(metrics) == {"sal", "edge", "depth"}
    shutil.rmtree(tmp_path / "run")
    metrics = changed(tmp_path, "assets/recipes.md", 0, judging("deep"))
    assert set(metrics) == {*TASKS, "depth"} and 0 < metrics["depth"] < 20
    depth = demo.scene(0, 36, 48)["depth"]
    written = np.asarray(Image.open(tmp_path / "deep/depth/2008_000001.png"))
    assert (depth < 25).any() and abs(written / 10 - depth)[depth < 25].max() <= 0.0501


def test_photos_of_ones_own_with_two_tasks(mini, tmp_path):
    root = tmp_path / "CamVid"
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        lines = []
        for id in data.read_ids(mini, split):
            Image.open(data.find(mini, "image", id)).save(root / split / f"{id}.png")
            classes = np.array(Image.open(data.find(mini, "semseg", id)))
            labels = Image.fromarray(np.where(classes > 10, 11, classes).astype(np.uint8))
            labels.save(root / f"{split}annot/{id}.png")
            lines.append(f"/SegNet/CamVid/{split}/{id}.png /SegNet/CamVid/{split}annot/{id}.png\r\n")
        (root / f"{split}.txt").write_text("".join(lines), encoding="utf-8-sig", newline="")
    code = judging(root, "--backbone vit_tiny --tasks semseg,edge") + f"""
image, truth = data.PascalContext({str(root)!r}, "train", 32, ["semseg", "edge"])[0]
labels = truth["semseg"].numpy()
assert set(labels.ravel()) <= {{*range(11), 255}} and (labels == 255).any()
assert (truth["edge"] == data.thin(data.boundaries(truth["semseg"][None]))[0]).all()
"""
    assert set(changed(tmp_path, "assets/recipes.md", 1, code)) == {"semseg", "edge"}


def test_uncertainty_weighting_learns_a_variance_for_each_task(mini, tmp_path):
    """AdamW's first update moves s against its gradient, (1 − w L) / 2, whatever the micro-batches."""
    argv = flags(mini, "run", "--epochs 1 --batch 13 --tasks sal,edge --mi 0 --noise 0")
    changed(tmp_path, "assets/recipes.md", 2, f"""
from pathlib import Path
train.main({argv})
train.main({argv} + ["--out", "parts", "--micro-batch", "5"])
train.main(["--extend", "run", "--tasks", "normals", "--epochs", "1", "--batch", "4", "--out", "more"])
whole, parts, more = (evaluate.load_checkpoint(out)["model"] for out in ("run", "parts", "more"))
for task, weight in (("sal", 5), ("edge", 50)):
    name, loss = f"log_variance.{{task}}", evaluate.read_log(Path("run"))[0]["losses"][task]
    assert whole[name] != 0 and (whole[name] < 0) == (weight * loss < 1), (name, whole[name], loss)
    assert abs(whole[name] - parts[name]) < 1e-6 and more[name] == whole[name]
assert more["log_variance.normals"] != 0
""")


def test_a_layer_of_another_transformer_learns_two_tasks_on_text(tmp_path, monkeypatch):
    """Of each letter in a text: is it the text's first one; how often did it occur before, up to 3 times?"""
    code = (ROOT / "assets/recipes.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
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


def bench(rounds=7, image=224, dim=768, depth=12, **shape):
    """Time the expert layer and a whole step, one image and five tasks, beside one always-on LoRA in their
    place: milliseconds, and the time relative to it in the same round, ± half the quartiles' distance."""
    device = data.pick_device()
    config = ase.Config(image=image, dim=dim, depth=depth, experts=32, topk=6, shared=2, rank=2, **shape)
    images = torch.randn(1, 3, image, image, device=device)
    x = torch.randn(5, 1, 1 + (image // 16) ** 2, dim, device=device, requires_grad=True)
    jobs = {}  # (what, who): function
    for name, layer in {"one LoRA of rank 64": OneLoRA, "fused": ase.LoRAExperts, "loop": Loop}.items():
        model = ase.ASE(config)
        for block in model.blocks:
            block.experts = experts_of(config, layer)
        optimizer = torch.optim.AdamW([p for p in model.to(device).parameters() if p.requires_grad])

        def step(model=model, optimizer=optimizer):
            sum(map(torch.sum, model(images)[0].values())).backward()
            optimizer.step()
            optimizer.zero_grad()

        jobs["layer", name] = lambda layer=model.blocks[0].experts: layer(x)[0].sum().backward()
        jobs["step", name] = step
    times = {job: [] for job in jobs}
    for n in range(rounds + 1):
        for job, function in jobs.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[job] += [time.perf_counter() - start] if n else []  # the first round warms up
    print(f"ViT-base, (32/6/2/2), {device}, {torch.get_num_threads()} threads, {rounds} rounds")
    for what, name in sorted(jobs, key=lambda job: job[0]):
        first, own = times[what, "one LoRA of rank 64"], times[what, name]
        low, ratio, high = np.percentile(np.divide(own, first), (25, 50, 75))
        print(f"{what:6}{name:20}{1e3 * np.median(own):9.1f} ms{ratio:8.2f} ±{(high - low) / 2:.2f}")


def test_the_bench_times_every_row(capsys):
    bench(rounds=1, image=16, dim=12, depth=1, heads=2, head_dim=4)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == 3 * ["layer"] + 3 * ["step"] and all("ms" in row for row in rows)


if __name__ == "__main__":
    bench()
