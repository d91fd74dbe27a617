"""Adaptive Shared Experts (ASE): the whole model, from the gates to the heads.

    python ase.py    what the model is made of: parameters by part, for every row of Table 1

A vision transformer (ViT) pretrained on one task serves T dense-prediction tasks. Its weights stay frozen;
beside them are trained: a LoRA of rank 4 on every linear layer, N LoRA experts of rank r in parallel with
every FFN, one router per task and layer, an embedding per task, and a head per task. The paper's idea is in
`gate`, its layer is `LoRAExperts`.

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
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

GATINGS = ("joint", "fixed")
LARGEST = 8192  # upper limit of every number in a Config
PAPER_TASKS = {"semseg": 21, "human_parts": 7, "sal": 1, "edge": 1, "normals": 3}  # task → channels

BACKBONES = {
    "vit_tiny": dict(image=96, patch=8, dim=128, depth=4, heads=4, head_dim=32),  # for two cores
    "vit_small": dict(image=224, patch=16, dim=384, depth=12, heads=6, head_dim=256),
    "vit_base": dict(image=224, patch=16, dim=768, depth=12, heads=12, head_dim=256),
}


def require(condition, message):
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Config:
    """All that decides the model's shape. The defaults are the paper's: ViT-base, (N/k/S/r) = (16/3/1/4).

    `experts=0` is the plain multi-task ViT: no experts, no routers, no task embedding, one pass for all
    tasks. `lora=0` trains the backbone in full. Raises ValueError, in one line, for what makes no sense.
    """

    image: int = 224        # side of the square input, pixels
    patch: int = 16         # side of a patch, pixels: a power of two
    dim: int = 768          # D
    depth: int = 12         # blocks
    heads: int = 12         # attention heads
    tasks: dict = field(default_factory=lambda: dict(PAPER_TASKS))  # task → channels of its prediction
    experts: int = 16       # N, shared ones included
    topk: int = 3           # K, shared ones not included
    shared: int = 1         # S
    rank: int = 4           # R
    noise: float = 1.0      # factor of the routers' learned noise in training; 0: none, nor a matrix for it
    gating: str = "joint"   # "joint": Eq. 8–9 (ASE) · "fixed": Eq. 1–3, for the shared experts Eq. 5
    lora: int | None = None  # rank of the LoRA on the backbone's linear layers; None: 4, or 0 without experts
    head_dim: int = 256     # channels inside a head

    def __post_init__(self):
        if self.lora is None:
            object.__setattr__(self, "lora", 4 if self.experts else 0)
        unused = () if self.experts else ("topk", "shared", "rank")
        for f in fields(self):
            value, low = getattr(self, f.name), 0 if f.name in ("experts", "topk", "shared", "lora") else 1
            if f.type in (int, int | None) and f.name not in unused:
                require(type(value) is int and low <= value <= LARGEST,
                        f"{f.name} is {value!r}: expected a whole number from {low} to {LARGEST}")
        require(type(self.noise) in (int, float) and 0 <= self.noise < math.inf,
                f"noise is {self.noise!r}: expected a number, 0 or more")
        require(isinstance(self.tasks, dict) and self.tasks,
                f"tasks is {self.tasks!r}: expected at least one task → channels")
        object.__setattr__(self, "tasks", dict(self.tasks))  # the caller's may change
        for task, channels in self.tasks.items():
            require(str(task).isidentifier() and type(channels) is int and 1 <= channels <= LARGEST,
                    f"task {task!r} has {channels!r} channels: expected a plain name → 1 to {LARGEST}")
        require(self.patch > 1 and self.patch & (self.patch - 1) == 0,
                f"patch is {self.patch}: expected a power of two, such as 16")
        require(self.image % self.patch == 0,
                f"an image side of {self.image} is no multiple of the patch {self.patch}: "
                f"the next one is {-(-self.image // self.patch) * self.patch}")
        require(self.dim % self.heads == 0,
                f"width {self.dim} does not divide into {self.heads} attention heads")
        require(self.gating in GATINGS, f"unknown gating {self.gating!r}: expected {' or '.join(GATINGS)}")
        if self.experts:
            sparse = self.experts - self.shared
            require(sparse >= 1, f"{self.shared} shared experts of {self.experts} leave no sparse one: "
                                 f"shared must be at most {self.experts - 1}")
            require(1 <= self.topk <= sparse,
                    f"topk is {self.topk}, but {self.experts} experts less {self.shared} shared ones are "
                    f"{sparse} sparse ones: topk must be 1 to {sparse}")


# ------------------------------------------------------------------------------------------ gates and experts


def gate(logits, shared, topk, gating):
    """Gates of all experts from the router's logits: the paper's contribution is the branch "joint".

    logits (..., N), the first `shared` columns belong to the shared experts. Returns gates of the same shape,
    zero for experts that are not selected; exactly `topk` sparse experts are, even where logits tie. Computed
    in float32 or higher.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sparse = logits[..., shared:]
    chosen = torch.zeros_like(sparse, dtype=torch.bool)
    chosen = chosen.scatter(-1, sparse.topk(topk, sorted=False).indices, True)
    if gating == "joint":
        # Eq. 8–9: g_i = exp(z_i) / Σ,  gs_i = exp(zs_i) / Σ,  Σ over the k kept sparse and the S shared
        # logits together
        active = F.pad(chosen, (shared, 0), value=True)
        return logits.masked_fill(~active, -math.inf).softmax(-1)
    # Eq. 1–3: softmax over all sparse experts, then the top k, not normalised again;  Eq. 5: gs_i = 1
    return F.pad(sparse.softmax(-1) * chosen, (shared, 0), value=1.0)


class LoRAExperts(nn.Module):
    """N LoRA experts beside an FFN, used by every task, and a router for each task: Σ g_i E_i(x) of Eq. 10.

    All experts are computed: side by side they are one matrix of N·R rows, which costs about 2% of the FFN
    in the paper's settings (N·R = 64); an expert that was not selected has gate 0. No loop over experts, no
    token dispatch, no dropped token. What a task owns carries its name, `router.semseg`; `tasks`: T names, or
    T itself.
    """

    def __init__(self, *, dim, tasks, experts, topk, shared, rank, gating="joint", noise=1.0):
        super().__init__()
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
        def each(x, matrices):
            return torch.bmm(x, torch.stack([*matrices.values()]).to(x.dtype))           # (T, B·L, N)

        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(1, -2)         # (T, B·L, D)
            z = each(x, self.router)                                                     # (T, B·L, N)
            if self.training and self.noise:
                # Shazeer et al. 2017, Eq. 4: z + ε · softplus(W_noise x); the floor of 0.01 is their code's
                deviation = F.softplus(each(x, self.router_noise)) + 0.01                # (T, B·L, N)
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
    power: torch.Tensor  # (blocks, T, 2)   mean square of the experts' update, and of the FFN's beside it


def mutual_information(probs):
    """Mutual information of tasks and experts in each block, in nats (Mod-Squad).

    probs (blocks, T, N−S) → (blocks,).

    I = Σ_t Σ_i P(t) P(E_i|t) log(P(E_i|t) / P(E_i)),  P(t) = 1/T,  P(E_i) = Σ_t P(t) P(E_i|t)
    """
    probs = probs.clamp_min(torch.finfo(probs.dtype).tiny)  # log 0 has no gradient
    marginal = probs.mean(1, keepdim=True)                                               # (blocks, 1, N−S)
    return (torch.xlogy(probs, probs) - torch.xlogy(probs, marginal)).sum(-1).mean(-1)   # (blocks,)


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
        power = [y.detach().square().mean((1, 2, 3), dtype=gates.dtype) for y in (update, ffn)]
        return x + ffn + update, Routing(probs, gates, torch.stack(power, -1))           # Eq. 10


class Head(nn.Module):
    """SETR-PUP: 3×3 convolutions with ×2 upsampling between them, from patch tokens to a full-size map.

    The norm is GroupNorm where M3ViT has BatchNorm: as many parameters, but independent of how a batch is
    split.
    """

    def __init__(self, config, channels):
        super().__init__()
        self.side = config.image // config.patch
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        width, stages = config.head_dim, int(math.log2(config.patch))
        groups = math.gcd(width, min(32, max(1, width // 8)))  # 32, fewer in a narrow head
        layers = []
        for stage in range(stages):
            layers += [nn.Conv2d(width if stage else config.dim, width, 3, padding=1)]
            layers += [nn.GroupNorm(groups, width), nn.ReLU(inplace=True)]
            if stage < stages - 1:
                layers += [nn.Upsample(scale_factor=2, mode="bilinear")]
        layers += [nn.Conv2d(width, channels, 1), nn.Upsample(scale_factor=2, mode="bilinear")]
        self.layers = nn.Sequential(*layers)

    def forward(self, tokens):
        """tokens (B, L, D), class token first → (B, C, H, W)."""
        patches = self.norm(tokens[:, 1:])                                               # (B, P, D)
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
        if config.experts:
            self.task_embedding = nn.ParameterDict((task, torch.zeros(config.dim)) for task in config.tasks)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.heads = nn.ModuleDict({task: Head(config, channels) for task, channels in config.tasks.items()})
        for name, parameter in self.named_parameters():
            parameter.requires_grad = part(name) != "backbone" or config.lora == 0

    def features(self, images):
        """images (B, 3, H, W) → tokens (T, B, L, D) after the final norm, class token first, and `Routing`.

        Without experts all tasks share one pass: tokens (1, B, L, D).
        """
        x = self.patch_embed.proj(images).flatten(2).mT                                  # (B, P, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed    # (B, L, D)
        x = x[None]                                                                      # (1, B, L, D)
        if self.config.experts:
            x = x + torch.stack([*self.task_embedding.values()])[:, None, None]          # (T, B, L, D)
        rows = []
        for block in self.blocks:
            x, row = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
            if row is not None:
                rows.append(row)
        none = x.new_zeros(0, len(self.heads), 0)
        routing = Routing(*map(torch.stack, zip(*rows))) if rows else Routing(none, none, none)
        return self.norm(x), routing

    def forward(self, images):
        """images (B, 3, H, W) → raw predictions {task: (B, C, H, W)} and `Routing`."""
        tokens, routing = self.features(images)
        tokens = tokens.expand(len(self.heads), -1, -1, -1)                              # (T, B, L, D)
        return {task: head(x) for (task, head), x in zip(self.heads.items(), tokens)}, routing


PARTS = {  # part → the whole names of its parameters, as a pattern
    # what a ViT of timm has, and nothing else: all that is new is trained
    "backbone": r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
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

WRAPPERS = ("model", "state_dict", "teacher")  # what a checkpoint may keep the weights under
SHAPES = {(b["dim"], b["depth"], b["patch"]): name for name, b in BACKBONES.items()}
PRESETS = "expected " + " or ".join("{} (width {}, {} blocks, patch {})".format(name, *shape)
                                    for shape, name in SHAPES.items())

# transformers' names of a ViT → timm's, in this order; the second of two is version 5's, in memory
TRANSFORMERS = {
    r"^embeddings\.": "", r"^position_embeddings": "pos_embed",
    r"^patch_embeddings\.projection": "patch_embed.proj", r"^(encoder\.layer|layers)\.": "blocks.",
    r"attention\.(attention\.query|q_proj)": "attn.q", r"attention\.(attention\.key|k_proj)": "attn.k",
    r"attention\.(attention\.value|v_proj)": "attn.v", r"attention\.(output\.dense|o_proj)": "attn.proj",
    r"intermediate\.dense": "mlp.fc1", r"output\.dense": "mlp.fc2", r"^layernorm\.": "norm.",
    "layernorm_before": "norm1", "layernorm_after": "norm2"}

# weights that do not change the features: used only after the blocks, or only in pretraining
HARMLESS = r"(mask\w*|pre_logits|fc|fc_norm|\w*(head|pool|proj|pred|decoder|classifier)\w*)(\..*)?"


def load(path):
    """What torch.save wrote to `path`, or a .safetensors file, on the CPU. Raises ValueError, in one line.

    No code in it is run. torch.save makes a zip, whose checksums are verified here: torch doesn't.
    """
    try:
        with open(path, "rb") as file:
            if file.read(9)[8:] == b"{":
                return read_safetensors(Path(path))
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            require(not damaged, f"its part {damaged} is damaged")
        with torch.serialization.safe_globals([argparse.Namespace]):  # many checkpoints keep their flags
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind makes torch.load raise nearly anything
        reason = str(error) or type(error).__name__
    found = re.search(r"Unsupported global: GLOBAL (\S+)", reason)
    if found:
        raise ValueError(f"{path} holds {found[1]} beside tensors, which may run code: expected tensors "
                         "alone, such as a .safetensors file of the same weights")
    reason = reason.split("\n")[0].split(". ")[0]
    raise ValueError(f"cannot read {path} ({reason}): expected a file of torch.save or .safetensors")


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of header length, JSON, little-endian numbers."""
    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        require(length <= size - 8, f"its header claims {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    body = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + length:]  # mapped, not read
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in types:
            continue
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], types[entry["dtype"]]
        require(0 <= start <= end <= len(body) and end - start == math.prod(shape) * dtype.itemsize,
                f"the bytes {start} to {end} of {name} are not its {shape} {entry['dtype']} numbers")
        tensors[name] = body[start:end].clone().view(dtype).view(shape)
    return tensors


def timm_names(state):
    """A ViT's state dict with the names of transformers, if it has them, replaced by timm's."""
    vit = {}
    for name, x in state.items():
        for theirs, timm in TRANSFORMERS.items():
            name = re.sub(theirs, timm, name)
        vit[name] = x
    for name in [name for name in vit if ".attn.q." in name]:
        parts = [vit.get(name.replace(".q.", f".{which}.")) for which in "qkv"]
        if all(x is not None and x.shape[1:] == parts[0].shape[1:] and x.dim() for x in parts):
            vit[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return {name: x for name, x in vit.items() if not re.search(r"\.attn\.[qkv]\.", name)}


class Pretrained(NamedTuple):
    """A pretrained ViT as it was read."""

    path: Path
    state: dict  # timm's name of a ViT's weight → tensor
    left: list   # names of what else the file holds


def read_backbone(source):
    """A pretrained ViT, as `Pretrained`; `source` is a file, or what this function has returned before.

    The file: a state dict from torch.save or a .safetensors file, bare or under "model", "state_dict" or
    "teacher"; names of timm (DeiT, MAE, MoCo v3 and DINO have them, too) or of transformers, after any
    prefix. Raises ValueError, in one line, for whatever is no plain ViT.
    """
    if isinstance(source, Pretrained):
        return source
    path = Path(source)
    accepted = "expected a ViT's state dict, timm's or transformers' names, .safetensors or from torch.save"
    require(path.is_file(), f"no weights file {path}: {accepted}")
    state = load(path)
    for wrapper in 3 * WRAPPERS:  # one may be inside another
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    require(isinstance(state, dict), f"{path} holds a {type(state).__name__}: {accepted}")
    state = {" ".join(str(name).split()): x for name, x in state.items()
             if isinstance(x, torch.Tensor) and x.layout == torch.strided and x.is_floating_point()}
    tokens = (re.fullmatch(r"(|.*?\.)(embeddings\.)?cls_token", name) for name in state)
    # of several ViTs the teacher, which is the one that DINO evaluates, else the first
    prefix = min((match[1] for match in tokens if match), key=lambda p: "teacher" not in p, default="")
    left = [name for name in state if not name.startswith(prefix)]
    vit = timm_names({name.removeprefix(prefix): x for name, x in state.items() if name not in left})
    dims = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    require(all(name in vit and vit[name].dim() == dims[name] for name in dims),
            f"{path} holds no ViT (its first names: {', '.join(list(state)[:3]) or 'none'}): {accepted}")
    more = [name for name in vit if part(name) != "backbone"]
    for name in more:
        acts = not re.fullmatch(HARMLESS, name) or name.startswith("fc_norm") and "norm.weight" not in vit
        require(not acts, f"{path} holds another architecture: {name} is no part of a plain ViT; {PRESETS}")
    return Pretrained(path, {name: x for name, x in vit.items() if name not in more}, more + left)


def shape_of(state):
    """(width, depth, patch) of a ViT's state dict with timm's names."""
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return state["cls_token"].shape[-1], depth, state["patch_embed.proj.weight"].shape[-1]


def backbone_for(source):
    """The name of the preset that the weights in `source` fit, as in `read_backbone`. Raises ValueError."""
    path, state, _ = read_backbone(source)
    found = shape_of(state)
    require(found in SHAPES,
            "{} holds a ViT of width {}, {} blocks, patch {}: {}".format(path, *found, PRESETS))
    return SHAPES[found]


def load_backbone(model, source):
    """Copy pretrained weights into the backbone of `model`; return one line that tells what was done.

    `source`: as in `read_backbone`. Position embeddings of another grid are resized. Raises ValueError, in
    one line, where a weight is missing or does not fit; nothing is copied then.
    """
    path, state, left = read_backbone(source)
    state = dict(state)  # the caller may go on to use his own
    own = {name: p for name, p in model.state_dict().items() if part(name) == "backbone"}
    found, wanted = shape_of(state), shape_of(own)
    advice = f"use --backbone {SHAPES[found]}" if found in SHAPES else PRESETS
    require(found == wanted, "{} holds a ViT of width {}, {} blocks, patch {}; the model has width {}, "
                             "{} blocks, patch {}: {}".format(path, *found, *wanted, advice))
    told = f"{len(own)} tensors loaded from {path}"
    if state["pos_embed"].shape != own["pos_embed"].shape:
        positions = state["pos_embed"].shape[1]
        old, new = (math.isqrt(max(0, p.shape[1] - 1)) for p in (state["pos_embed"], own["pos_embed"]))
        require(old and positions == 1 + old * old,
                f"{path} has {positions} position embeddings: expected 1 + a square")
        token, grid = state["pos_embed"].float().split([1, old * old], dim=1)
        grid = grid.mT.unflatten(-1, (old, old))
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
        state["pos_embed"] = torch.cat([token, grid.flatten(2).mT], dim=1)
        told += f", position embeddings resized from {old}×{old} to {new}×{new}"
    for name, p in own.items():
        require(name in state, f"{path} lacks {name}: not a whole ViT, take another file")
        require(state[name].shape == p.shape,
                f"{name} in {path} is {tuple(state[name].shape)}: expected {tuple(p.shape)}")
        require(state[name].isfinite().all(), f"{name} in {path} is not finite: take another copy of it")
    for name, p in own.items():
        p.copy_(state[name])
    if left:
        told += f", {len(left)} left out as no part of the backbone ({', '.join(left[:3])})"
    return told


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
