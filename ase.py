"""Adaptive Shared Experts (ASE): the whole model, from the gates to the heads.

    python ase.py    what the model is made of: parameters by part, for every row of Table 1

A vision transformer (ViT) pretrained on one task serves T dense-prediction tasks. Its weights stay frozen;
beside them are trained: a LoRA of rank 4 on every linear layer, N LoRA experts of rank r in parallel with
every FFN, one router per task and layer, an embedding per task, and a head per task. The paper's idea is in
`gate`, its layer is `LoRAExperts`, its model is `ASE`.

References: ASE: Yang et al. 2025, arXiv 2510.00570 (equation numbers are this paper's) · LoRA: Hu et al.
2021 · noisy top-k gating: Shazeer et al. 2017 · mutual information loss: Mod-Squad, Chen et al. 2023 ·
ViT: Dosovitskiy et al. 2021 · heads: SETR-PUP, Zheng et al. 2021.

Shapes: T tasks · B images · L tokens (the class token and P patches) · D width · N experts, the first S
of them shared · K sparse experts active for a token · R rank of an expert. Comments at the end of a line
give the result's shape.
"""

import argparse
import json
import math
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

GATINGS = ("joint", "fixed")


def require(condition, message):
    if not condition:
        raise ValueError(message)


def check_experts(experts, topk, shared, gating):
    """Raises ValueError, in one line, for numbers of experts that do not go together."""
    sparse = experts - shared
    require(gating in GATINGS, f"unknown gating {gating!r}: expected {' or '.join(GATINGS)}")
    require(0 <= shared < experts, f"{shared} of {experts} experts shared: expected 0 to {experts - 1}")
    require(1 <= topk <= sparse, f"topk is {topk}: expected 1 to {sparse}, the experts that are not shared")


# ------------------------------------------------------------------------------------------ gates and experts


def gate(logits, shared, topk, gating):
    """Gates of all experts from the router's logits: the paper's contribution is the branch "joint".

    logits (..., N), the first `shared` columns belong to the shared experts. Returns gates of the same shape,
    zero for experts that are not selected; exactly `topk` sparse experts are, even where logits tie. Computed
    in float32 or higher. Raises ValueError for numbers that do not go together.
    """
    check_experts(logits.shape[-1], topk, shared, gating)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sparse = logits[..., shared:]
    chosen = torch.zeros_like(sparse, dtype=torch.bool)
    chosen = chosen.scatter(-1, sparse.topk(topk, sorted=False).indices, True)
    if gating == "joint":
        # Eq. 8–9: g_i = exp(z_i) / Σ,  gs_i = exp(zs_i) / Σ,  Σ over k kept sparse and S shared logits
        active = F.pad(chosen, (shared, 0), value=True)
        return logits.masked_fill(~active, -math.inf).softmax(-1)
    # Eq. 1–3: softmax over all sparse experts, then the top k, not normalised again;  Eq. 5: gs_i = 1
    return F.pad(sparse.softmax(-1) * chosen, (shared, 0), value=1.0)


class LoRAExperts(nn.Module):
    """N LoRA experts beside an FFN, used by every task, and a router for each task: Σ g_i E_i(x) of Eq. 10.

    All experts are computed: side by side they are one matrix of N·R rows, which costs about 2% of the FFN
    in the paper's settings (N·R = 64); an expert that was not selected has gate 0. No loop over experts, no
    token dispatch, no dropped token. What a task owns carries its name, `router.semseg`; `tasks`: T names, or
    T itself. Raises ValueError for numbers that do not go together.
    """

    def __init__(self, *, dim, tasks, experts, topk, shared, rank, gating="joint", noise=1.0):
        super().__init__()
        check_experts(experts, topk, shared, gating)
        self.topk, self.shared, self.gating, self.noise = topk, shared, gating, noise
        tasks = [*map(str, range(tasks) if isinstance(tasks, int) else tasks)]
        # Eq. 6–7, transposed: the first S columns are W_s (shared experts), the others W_g (sparse ones)
        self.router = nn.ParameterDict((task, 0.02 * torch.randn(dim, experts)) for task in tasks)
        self.router_noise = nn.ParameterDict((task, torch.zeros(dim, experts)) for task in tasks if noise)
        self.down = nn.Parameter(torch.empty(experts, rank, dim))     # A_i
        self.up = nn.Parameter(torch.zeros(experts, rank, dim))       # B_i, transposed
        nn.init.kaiming_uniform_(self.down.view(-1, dim), a=math.sqrt(5))

    def logits(self, x):
        """Router logits, noisy in training only; outside autocast, in float32 at least.

        x (T, …, D) → (T, B·L, N).
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, -2)         # (T, B·L, D)
            z = torch.bmm(x, torch.stack([*self.router.values()]).to(x.dtype))           # (T, B·L, N)
            if self.training and self.noise:
                # Shazeer et al. 2017, Eq. 4: z + ε · softplus(W_noise x); the floor of 0.01 is their code's
                deviation = torch.bmm(x, torch.stack([*self.router_noise.values()]).to(x.dtype))
                deviation = F.softplus(deviation) + 0.01                                 # (T, B·L, N)
                z = z + self.noise * deviation * torch.randn_like(z)                     # (T, B·L, N)
        return z

    def forward(self, x):
        """x (T, …, D) → update of its shape, probs (T, N−S), gates (T, N), as in `Routing`."""
        z = self.logits(x)                                                               # (T, B·L, N)
        gates = gate(z, self.shared, self.topk, self.gating)                             # (T, B·L, N)
        update = self.mix(x.flatten(1, -2), gates)                                       # (T, B·L, D)
        probs = z[..., self.shared:].softmax(-1).mean(1)                                 # (T, N−S)
        return update.view_as(x), probs, gates.mean(1)

    def mix(self, x, gates):
        """Σ g_i E_i(x). x (T, B·L, D), gates (T, B·L, N) → (T, B·L, D)."""
        hidden = x @ self.down.flatten(0, 1).T                                           # (T, B·L, N·R)
        # (T, B·L, N, R): each expert's R hidden channels times its gate
        hidden = hidden.unflatten(-1, self.down.shape[:2]) * gates.to(hidden.dtype).unsqueeze(-1)
        return hidden.flatten(-2) @ self.up.flatten(0, 1)                                # (T, B·L, D)

    def reference(self, x):
        """The update without noise as the paper prints it: a loop over tasks, tokens and experts."""
        shared, sparse = range(self.shared), range(self.shared, len(self.down))
        update = []
        for router, tokens in zip(self.router.values(), x.flatten(1, -2)):
            for token in tokens:
                z = token @ router
                kept = sorted(sparse, key=lambda i: -z[i])[:self.topk]
                if self.gating == "joint":
                    total = sum(z[i].exp() for i in [*shared, *kept])                    # Eq. 8–9
                    gates = {i: z[i].exp() / total for i in [*shared, *kept]}
                else:
                    total = sum(z[i].exp() for i in sparse)                              # Eq. 2
                    gates = {i: z[i].exp() / total for i in kept}                        # Eq. 1, 3
                    gates |= {i: 1.0 for i in shared}                                    # Eq. 5
                update.append(sum(g * (self.up[i].T @ (self.down[i] @ token)) for i, g in gates.items()))
        return torch.stack(update).view_as(x)


class Routing(NamedTuple):
    """What the routers did, averaged over images and tokens, in each block with experts; of shape (0, T, 0)
    if no block has any."""

    probs: torch.Tensor  # (blocks, T, N−S) softmax of sparse logits before top-k, for `mutual_information`
    gates: torch.Tensor  # (blocks, T, N)   gates after top-k, shared experts first: the paper's Fig. 4


def mutual_information(probs):
    """Mutual information of tasks and experts in each block, in nats (Mod-Squad).

    probs (blocks, T, N−S) → (blocks,).

    I = Σ_t Σ_i P(t) P(E_i|t) log(P(E_i|t) / P(E_i)),  P(t) = 1/T,  P(E_i) = Σ_t P(t) P(E_i|t)
    """
    probs = probs.clamp_min(torch.finfo(probs.dtype).tiny)  # log 0 has no gradient
    marginal = probs.mean(1, keepdim=True)                                               # (blocks, 1, N−S)
    return (torch.xlogy(probs, probs) - torch.xlogy(probs, marginal)).sum(-1).mean(-1)   # (blocks,)


# ------------------------------------------------------------------------------------------ shapes of a model

BACKBONES = {
    "vit_tiny": dict(image=96, patch=8, dim=128, depth=4, heads=4, head_dim=32),  # for two cores
    "vit_small": dict(image=224, patch=16, dim=384, depth=12, heads=6, head_dim=256),
    "vit_base": dict(image=224, patch=16, dim=768, depth=12, heads=12, head_dim=256),
    "vit_large": dict(image=224, patch=16, dim=1024, depth=24, heads=16, head_dim=256),
}


@dataclass(frozen=True)
class Config:
    """All that decides the model's shape. The defaults are the paper's: ViT-base, (N/k/S/r) = (16/3/1/4).

    `experts=0` is the plain multi-task ViT: no experts, no routers, no task embedding, one pass for all
    tasks. `lora=0` trains the backbone in full. Raises ValueError, in one line, for what makes no sense.
    """

    image: int = 224        # side of the square input, pixels
    patch: int = 16         # side of a patch, pixels
    dim: int = 768          # D
    depth: int = 12         # blocks
    heads: int = 12         # attention heads
    # task → channels of its prediction
    tasks: dict = field(default_factory=lambda: dict(semseg=21, human_parts=7, sal=1, edge=1, normals=3))
    experts: int = 16       # N, shared ones included
    topk: int = 3           # K, shared ones not included
    shared: int = 1         # S
    rank: int = 4           # R
    noise: float = 1.0      # factor of the routers' learned noise in training; 0: none, nor a matrix for it
    gating: str = "joint"   # "joint": Eq. 8–9 (ASE) · "fixed": Eq. 1–3, for the shared experts Eq. 5
    lora: int | None = None  # rank of the LoRA on the backbone's linear layers; None: 4, or 0 without experts
    head_dim: int = 256     # channels inside a head
    registers: int = 0      # tokens beside the class token that have no position (DINOv2)

    def __post_init__(self):
        if self.lora is None:
            object.__setattr__(self, "lora", 4 if self.experts else 0)
        least = dict(image=1, patch=2, dim=1, depth=1, heads=1, head_dim=1, experts=0, lora=0, registers=0)
        least |= dict(topk=1, shared=0, rank=1) if self.experts else {}
        for name, low in least.items():
            value = getattr(self, name)
            require(type(value) is int and value >= low, f"{name} is {value!r}: expected an integer ≥ {low}")
        require(0 <= self.noise < math.inf, f"noise is {self.noise!r}: expected a number, 0 or more")
        require(self.tasks, "there is no task: expected one or more, name → channels")
        object.__setattr__(self, "tasks", dict(self.tasks))  # the caller's may change
        for task, channels in self.tasks.items():
            require(str(task).isidentifier() and type(channels) is int and channels >= 1,
                    f"task {task!r} has {channels!r} channels: expected a plain name → 1 or more")
        require(self.image % self.patch == 0,
                f"the image's side of {self.image} is no multiple of the patch, {self.patch}")
        require(self.dim % self.heads == 0, f"width {self.dim} does not divide into {self.heads} heads")
        if self.experts:
            check_experts(self.experts, self.topk, self.shared, self.gating)


# ------------------------------------------------------------------------------------- the vision transformer


class LoRALinear(nn.Linear):
    """A linear layer with a LoRA of rank `rank` beside it: y = W x + b + B A x. B starts at zero."""

    def __init__(self, inputs, outputs, rank):
        super().__init__(inputs, outputs)
        nn.init.zeros_(self.bias)
        self.rank = rank
        if rank:
            self.lora_down = nn.Parameter(torch.empty(rank, inputs))          # A
            self.lora_up = nn.Parameter(torch.zeros(outputs, rank))           # B
            nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))

    def forward(self, x):
        y = super().forward(x)
        if self.rank == 0:
            return y
        # one product that adds to y: 14% less time, forward and backward, at width 128; 3% at 768
        low = F.linear(x, self.lora_down).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), low, self.lora_up.T).view_as(y)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = LoRALinear(config.dim, 3 * config.dim, config.lora)
        self.proj = LoRALinear(config.dim, config.dim, config.lora)

    def forward(self, x):
        """x (T, B, L, D) → (T, B, L, D)."""
        qkv = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1))  # (T·B, L, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (T·B, heads, L, D/heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class FFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = LoRALinear(config.dim, 4 * config.dim, config.lora)
        self.fc2 = LoRALinear(4 * config.dim, config.dim, config.lora)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = FFN(config)
        self.experts = None
        if config.experts:
            self.experts = LoRAExperts(dim=config.dim, tasks=config.tasks, experts=config.experts,
                                       topk=config.topk, shared=config.shared, rank=config.rank,
                                       gating=config.gating, noise=config.noise)

    def forward(self, x):
        """x (T, B, L, D) → x and this block's row of `Routing`; without experts None for that."""
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        ffn = self.mlp(h)
        if self.experts is None:
            return x + ffn, None
        update, probs, gates = self.experts(h)
        return x + ffn + update, Routing(probs, gates)                                   # Eq. 10


class Head(nn.Module):
    """SETR-PUP: 3×3 convolutions with ×2 upsampling between them, from patch tokens to a full-size map.

    The norm is GroupNorm where M3ViT has BatchNorm: as many parameters, but independent of how a batch is
    split.
    """

    def __init__(self, config, channels):
        super().__init__()
        self.side = config.image // config.patch
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.extra = 1 + config.registers  # tokens in front of the patches
        width, stages = config.head_dim, round(math.log2(config.patch))
        groups = math.gcd(width, min(32, max(1, width // 8)))  # 32, fewer in a narrow head
        layers = []
        for stage in range(stages):
            layers += [nn.Conv2d(width if stage else config.dim, width, 3, padding=1)]
            layers += [nn.GroupNorm(groups, width), nn.ReLU(inplace=True)]
            if stage < stages - 1:
                layers += [nn.Upsample(scale_factor=2, mode="bilinear")]
        layers += [nn.Conv2d(width, channels, 1), nn.Upsample(config.image, mode="bilinear")]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens):
        """tokens (B, L, D), class token and registers first → (B, C, H, W)."""
        patches = self.norm(tokens[:, self.extra:])                                      # (B, P, D)
        return self.layers(patches.mT.unflatten(-1, (self.side, self.side)))             # (B, C, H, W)


class ASE(nn.Module):
    """A ViT, parameters named as in timm, with LoRA experts, routers and heads for `config.tasks`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: recompute each block in the backward pass, for memory
        patches = (config.image // config.patch) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, config.dim, config.patch, config.patch)})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, config.dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, config.dim))
        if config.registers:
            self.registers = nn.Parameter(0.02 * torch.randn(1, config.registers, config.dim))
        if config.experts:
            self.task_embedding = nn.ParameterDict((task, torch.zeros(config.dim)) for task in config.tasks)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.heads = nn.ModuleDict({task: Head(config, channels) for task, channels in config.tasks.items()})
        for name, parameter in self.named_parameters():
            parameter.requires_grad = part(name) != "backbone" or config.lora == 0

    def features(self, images):
        """images (B, 3, H, W) → tokens (T, B, L, D), class token and registers first, normed, and `Routing`.

        Without experts all tasks share one pass: tokens (1, B, L, D).
        """
        x = self.patch_embed.proj(images).flatten(2).mT                                  # (B, P, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed    # (B, L, D)
        if self.config.registers:
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)  # (B, L, D)
        x = x[None]                                                                      # (1, B, L, D)
        if self.config.experts:
            x = x + torch.stack([*self.task_embedding.values()])[:, None, None]          # (T, B, L, D)
        rows = []
        for block in self.blocks:
            x, row = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            if row is not None:
                rows.append(row)
        none = x.new_zeros(0, len(self.heads), 0)
        routing = Routing(*map(torch.stack, zip(*rows))) if rows else Routing(none, none)
        return self.norm(x), routing

    def forward(self, images):
        """images (B, 3, H, W) → raw predictions {task: (B, C, H, W)} and `Routing`."""
        tokens, routing = self.features(images)
        tokens = tokens.expand(len(self.heads), -1, -1, -1)                              # (T, B, L, D)
        return {task: head(x) for (task, head), x in zip(self.heads.items(), tokens)}, routing


PARTS = {  # part → the whole names of its parameters, as a pattern
    # what a ViT of timm has, and nothing else: all that is new is trained
    "backbone": r"cls_token|registers|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
                r"|blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)",
    "LoRA": r"blocks\..*\.lora_(down|up)", "experts": r"blocks\.\d+\.experts\.(?!router).*",
    "routers": r"blocks\.\d+\.experts\.router.*", "embeddings": r"task_embedding\..*", "heads": r"heads\..*",
    "others": ".*"}
OWN = ("routers", "embeddings", "heads")  # the parts of which each task has its own


def part(name):
    """The part of the model that a parameter belongs to, from its name: "others" for one that is new here."""
    return next(found for found, pattern in PARTS.items() if re.fullmatch(pattern, name))


def count(model):
    """Parameters by part: {part: (all of them, trained ones)}."""
    counts = dict.fromkeys(PARTS, (0, 0))
    for name, p in model.named_parameters():
        total, trained = counts[part(name)]
        counts[part(name)] = total + p.numel(), trained + p.numel() * p.requires_grad
    return counts


# ----------------------------------------------------------------------------------------- pretrained weights

# transformers' names of a ViT → timm's, in this order; the second of two is version 5's, in memory
TRANSFORMERS = {
    r"^embeddings\.": "", r"^position_embeddings": "pos_embed",
    r"^patch_embeddings\.projection": "patch_embed.proj", r"^(encoder\.layer|layers)\.": "blocks.",
    r"attention\.(attention\.query|q_proj)": "attn.q", r"attention\.(attention\.key|k_proj)": "attn.k",
    r"attention\.(attention\.value|v_proj)": "attn.v", r"attention\.(output\.dense|o_proj)": "attn.proj",
    r"intermediate\.dense": "mlp.fc1", r"output\.dense": "mlp.fc2", r"^layernorm\.": "norm.",
    "layernorm_before": "norm1", "layernorm_after": "norm2", r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
    r"gamma_(\d)": r"ls\1.gamma", "^(reg_token|register_tokens)$": "registers"}

UNSUPPORTED = {"norm_pre|pre_layrnorm|ln_pre": "CLIP's first norm", "dist_token": "DeiT's distillation",
               r"mlp\.(w12|weights_in)": "SwiGLU"}
# names of weights that act on the features, so that none may be left out (mask_token: in pretraining alone)
ACTIVE = r"blocks\..*|norm.*|(?!mask)\w*token\w*|registers"


def load(path):
    """What torch.save wrote to `path`, or a .safetensors file, on the CPU. Raises ValueError, in one line.

    No code in it is run. torch.save makes a zip, whose checksums are verified here: torch doesn't.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(99).lstrip()
        require(b"//git-lfs" not in start, "it is a Git LFS pointer: `git lfs pull` gets the file")
        require(not start.startswith(b"<"), "it is a web page")
        if start[8:9] == b"{":
            return read_safetensors(Path(path))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            require(not damaged, f"its part {damaged} is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints keep their flags
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind makes torch.load raise nearly anything
        reason = (str(error) or type(error).__name__).split("\n")[0].split(". ")[0]
    raise ValueError(f"cannot read {path} ({reason}): expected tensors alone, of torch.save or .safetensors")


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, JSON, little-endian numbers."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)  # mapped, not read
    length = int(data[:8].view(torch.int64))
    tensors = {}
    for name, entry in json.loads(data[8:8 + length].numpy().tobytes()).items():
        if name != "__metadata__" and entry["dtype"] in types:
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = data[start:end].clone().view(types[entry["dtype"]]).view(entry["shape"])
    return tensors


def tensors_of(x, prefix=""):
    """(name, tensor) of all that lies in a dict, or in dicts inside it."""
    for key, value in x.items() if isinstance(x, dict) else ():
        if torch.is_tensor(value) and value.is_floating_point():
            yield f"{prefix}{key}", value
        yield from tensors_of(value, f"{prefix}{key}.")


def timm_names(state):
    """A ViT's state dict under timm's names. Transformers keeps q, k and v apart; timm stacks them as qkv."""
    for theirs, timm in TRANSFORMERS.items():
        state = {re.sub(theirs, timm, name): x for name, x in state.items()}
    for name in [name for name in state if ".attn.q." in name]:
        parts = [state.pop(name.replace(".q.", f".{letter}."), None) for letter in "qkv"]
        if all(x is not None for x in parts):
            state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    # LayerScale multiplies a linear layer's output: folded into its weights (a LoRA beside is not scaled)
    for scale, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        for name in [name for name in state if name.endswith(scale)]:
            scaled = [name.replace(scale, f"{layer}.{kind}") for kind in ("weight", "bias")]
            if all(x in state and state[x].shape[:1] == state[name].shape for x in scaled):
                gamma = state.pop(name)
                state |= {x: state[x] * gamma.view(-1, *[1] * (state[x].dim() - 1)) for x in scaled}
    return state


def read_backbone(path):
    """A pretrained ViT, {timm's name: tensor}, the prefix of its names in the file, and what else is there.

    The file: from torch.save or .safetensors; names of timm, of the originals (DeiT, MAE, MoCo v3, DINO,
    DINOv2) or of transformers, under any keys. Raises ValueError, in one line, for what is no plain ViT.
    """
    accepted = "expected a ViT's state dict, timm's or transformers' names, .safetensors or from torch.save"
    require(Path(path).is_file(), f"no weights file {path}: {accepted}")
    state = dict(tensors_of(load(path)))
    for pattern, why in UNSUPPORTED.items():
        found = [name for name in state if re.search(pattern, name)]
        require(not found, f"{path} is no plain ViT: {why} is not supported ({', '.join(found[:1])})")
    tokens = (re.fullmatch(r"(|.*?\.)(embeddings\.)?cls_token", name) for name in state)
    # of several ViTs the teacher, which is the one that DINO evaluates, else the first
    prefix = min((match[1] for match in tokens if match), key=lambda p: "teacher" not in p, default=None)
    require(prefix is not None, f"{path} holds no ViT (its first names: {[*state][:3]}): {accepted}")
    vit = timm_names({name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)})
    for name, dims in {"patch_embed.proj.weight": 4, "pos_embed": 3}.items():
        require(name in vit and vit[name].dim() == dims, f"{path} has no {name}" + (
            ": rotary positions are not supported" if name == "pos_embed" else " of a plain ViT"))
    if math.isqrt(vit["pos_embed"].shape[1]) ** 2 == vit["pos_embed"].shape[1]:  # none for the class token
        vit["pos_embed"] = F.pad(vit["pos_embed"], (0, 0, 1, 0))
    return vit, prefix, [name for name in state if not name.startswith(prefix)]


def shape_of(path):
    """The fields of `Config` that a file of pretrained weights decides. Attention heads show in no shape:
    their number is that of published ViTs of this width."""
    vit, prefix, _ = read_backbone(path)
    dim, patch = vit["cls_token"].shape[-1], vit["patch_embed.proj.weight"].shape[-1]
    depth = len({name.split(".")[1] for name in vit if name.startswith("blocks.")})
    side = patch * math.isqrt(vit["pos_embed"].shape[1] - 1)
    heads = {128: 4, 1280: 16, 1408: 16}.get(dim, dim // 64)
    heads = 12 if "base_encoder" in prefix and dim == 384 else heads  # MoCo v3's small one
    return dict(image=min(224, side), patch=patch, dim=dim, depth=depth, heads=heads,
                registers=len(vit.get("registers", [[]])[0]), head_dim=32 if dim == 128 else 256)


def load_backbone(model, path):
    """Copy pretrained weights into the backbone of `model`; return one line that tells what was done.

    path: as in `read_backbone`. Position embeddings of another grid are resized. Raises ValueError, in one
    line, where a weight is missing or does not fit; nothing is copied then.
    """
    state, _, beside = read_backbone(path)
    own = {name: p for name, p in model.state_dict().items() if part(name) == "backbone"}
    for name, p in own.items():
        require(name in state, f"{path} lacks {name}: not a whole ViT, take another file")
        x = state[name]
        fits = x.dim() == 3 and x.shape[::2] == p.shape[::2] if name == "pos_embed" else x.shape == p.shape
        require(fits, f"{name} in {path} is {tuple(x.shape)}, in the model {tuple(p.shape)}: "
                      "is the file another backbone's?")
    left = [name for name in state if name not in own]
    lost = next((name for name in left if re.fullmatch(ACTIVE, name)), None)
    require(not lost, f"{path} holds {lost}, for which the model has no place: is it another backbone's?")
    left += beside
    told = f"{len(own)} tensors loaded from {path}, {model.config.heads} attention heads assumed"
    if state["pos_embed"].shape != own["pos_embed"].shape:
        positions = state["pos_embed"].shape[1]
        old, new = (math.isqrt(p.shape[1] - 1) for p in (state["pos_embed"], own["pos_embed"]))
        require(old and positions == 1 + old * old, f"{path} has {positions} positions: not 1 + a square")
        token, grid = state["pos_embed"].float().split([1, old * old], dim=1)
        grid = grid.mT.unflatten(-1, (old, old))
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([token, grid.flatten(2).mT], dim=1)
        told += f", position embeddings resized from {old}×{old} to {new}×{new}"
    for name, p in own.items():
        p.copy_(state[name])
    return told + (f", {len(left)} left out as no part of it ({', '.join(left[:3])})" if left else "")


# ---------------------------------------------------------------------------------------------- python ase.py

TABLE1 = {  # row → the paper's parameters in millions, what they are here
    "MTL-ViT": (104, Config(experts=0)),
    "LoRA-MoE (16/4/0/4)": (107, Config(experts=16, topk=4, shared=0, rank=4, gating="fixed")),
    "LoRA-MoE (32/8/0/2)": (108, Config(experts=32, topk=8, shared=0, rank=2, gating="fixed")),
    "ASE (16/3/1/4)": (107, Config(experts=16, topk=3, shared=1, rank=4)),
    "ASE (32/6/2/2)": (108, Config(experts=32, topk=6, shared=2, rank=2)),
    "ASE (64/12/4/1)": ("–", Config(experts=64, topk=12, shared=4, rank=1)),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: parser.exit(2, f"error: {message}: `python ase.py --help` tells what is\n")
    parser.parse_args(argv)

    def parameters(config):
        with torch.device("meta"):
            return count(ASE(config))

    rows = {row: parameters(config) for row, (_, config) in TABLE1.items()}
    names = [name for name in PARTS if any(counts[name][0] for counts in rows.values())]
    print("ViT-base at 224×224, five tasks; (N/k/S/r) as in the paper's Table 1. Parameters in millions:\n")
    print(f"{'':20}" + "".join(f"{name:>11}" for name in names) + f"{'total':>9}{'trained':>9}{'paper':>7}")
    for row, counts in rows.items():
        total, trained = (sum(c[i] for c in counts.values()) / 1e6 for i in (0, 1))
        parts = "".join(f"{counts[name][0] / 1e6:11.2f}" for name in names)
        print(f"{row:20}{parts}{total:9.2f}{trained:9.2f}{TABLE1[row][0]:>7}")
    plain = {c.experts: parameters(replace(c, noise=0)) for _, c in TABLE1.values() if c.experts}
    print("Without router noise (noise = 0) the total is " + ", ".join(
        f"{sum(total for total, _ in counts.values()) / 1e6:.2f} for N = {n}" for n, counts in plain.items()))


if __name__ == "__main__":
    main()
