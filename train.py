"""Train a model on dense tasks into a run folder, or continue what was interrupted there.

    python train.py --experts 32 --topk 6 --shared 2 --rank 2         ASE, on the demo, made where missing
    python train.py --gating fixed --shared 0 --topk 4                vanilla LoRA-MoE, the paper's baseline
    python train.py --gating fixed                                    naive shared expert: its gate is 1
    python train.py --gating joint --shared 0 --topk 4                the control that the paper lacks
    python train.py --experts 0                                       the plain multi-task ViT
    python train.py --experts 0 --tasks semseg                        a single-task model
    python train.py --extend run4 --tasks normals --out run5          add a task to a trained model
    python train.py --data PASCAL_MT --weights vit_base.safetensors   the paper's setting
    torchrun --nproc_per_node=8 train.py …                            the same on several GPUs

The run folder holds config.json, log.jsonl (a record every few steps and every epoch) and checkpoint.pt: with
the data set, all that evaluate.py needs. Every step's randomness is a function of the seed, the step and the
process, so a run that was killed at any moment and started again with the same command ends, on a CPU, in the
same weights bit for bit.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

try:
    import fcntl, resource  # Windows has neither
except ImportError:
    fcntl = resource = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import ase
import data
import evaluate
from data import TASKS, UserError

MODEL = ("experts", "topk", "shared", "rank", "gating", "noise", "lora")  # flags that `ase.Config` has, too
# What the paper does not say is ours: optimiser, learning rate, warm-up, clipping.
PAPER = {flag: getattr(ase.Config, flag) for flag in MODEL} | dict(mi=0.005, mean_std="imagenet", seed=0)
DEMO = dict(backbone="vit_tiny", epochs=3, batch=2, lr=2e-3, val_images=50)
PASCAL = dict(backbone="vit_base", epochs=40, batch=32, lr=5e-4, val_images=500)
WEIGHT_DECAY = 0.01
WARMUP = 0.05        # fraction of all steps
GRAD_CLIP = 10.0     # largest norm of the gradient
PRETRAINED_LR = 0.1  # pretrained weights that are trained (--lora 0): their factor of the learning rate
LOG_EVERY = 50       # steps
CONFLICT = 16        # images whose gradients are compared
OWN_BACKBONE = Path(__file__).parent / "assets/vit_tiny.pt"  # the demo's, made by --pretrain
PRETRAIN = dict(images=24_000, held_out=400, epochs=8, batch=16, lr=1e-3, seed=0)


def learning_rate(step, steps, peak):
    """Linear warm-up, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(model, pretrained):
    """The optimiser's groups: {"params", "lr_scale", "weight_decay"} each.

    Weight decay acts on matrices, as in nanoGPT: not on biases, norms and task embeddings.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr_scale = PRETRAINED_LR if pretrained and ase.part(name) == "backbone" else 1.0
            weight_decay = WEIGHT_DECAY if parameter.dim() >= 2 else 0.0
            groups.setdefault((lr_scale, weight_decay), []).append(parameter)
    return [{"params": parameters, "lr_scale": lr_scale, "weight_decay": weight_decay}
            for (lr_scale, weight_decay), parameters in groups.items()]


def shuffle(images, epoch, seed):
    """Order and augmentation of an epoch's images, the same on any number of processes."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(images, generator=generator), data.random_warps(images, generator)


def train(settings, initial, args, rank, world, device):
    """From what `resolve` returned to the last checkpoint, as process `rank` of `world`."""
    out, config = Path(args.out), evaluate.with_tasks(ase.Config(**settings["model"]), settings["tasks"])
    checkpoint = resume(out, settings, args)
    if checkpoint and checkpoint["epoch"] == settings["epochs"]:
        return print(f"{out} is finished, {settings['epochs']} epochs; {next_command(out)}")
    if rank == 0:
        data.write_json(out / "config.json", settings)

    # -- the data
    if rank > 0:
        dist.barrier()  # process 0 renders and parses first
    train_set, val_set = prepare(settings, args, config)
    if rank == 0 and world > 1:
        dist.barrier()
    batch_size = settings["batch"]  # the effective one, of all processes
    micro_batch = args.micro_batch or batch_size // world
    steps_per_epoch = len(train_set) // batch_size
    steps = steps_per_epoch * settings["epochs"]

    # -- the model
    torch.manual_seed(settings["seed"])
    model = ase.ASE(config).to(device)
    model.checkpointing = args.checkpointing
    extended, loaded = {}, "random"
    if settings["extend"]:  # a run's model as it is, frozen: what is the new task's own starts fresh
        extended = checkpoint["model"] if checkpoint else initial
        model.load_state_dict(extended, strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ase.part(name) in ase.OWN
        loaded = f"{settings['extend']}, all of it frozen; new: what {settings['tasks']} alone uses"
    elif initial:
        loaded = ase.load_backbone(model, initial)
    optimizer = torch.optim.AdamW(parameter_groups(model, pretrained=bool(initial)), fused=True)
    first_epoch = 0
    if checkpoint:
        model.load_state_dict({name: checkpoint["model"][name] for name in model.state_dict()})
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_epoch = checkpoint["epoch"]
    del checkpoint  # it is as large as the model
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = DistributedDataParallel(network)
    loss_weights = {task: TASKS[task].weight if len(config.tasks) > 1 else 1 for task in config.tasks}
    log = Log(settings, args, first_epoch, steps_per_epoch, rank)
    if rank == 0:
        log.header(model, loaded, train_set, val_set, device)

    # -- the loop
    for epoch in range(first_epoch, settings["epochs"]):
        network.train()
        order, warps = shuffle(len(train_set), epoch, settings["seed"])
        # (steps, images): of each step's batch this process takes every world-th image, in micro-batches
        batches = order[:steps_per_epoch * batch_size].view(steps_per_epoch, batch_size)[:, rank::world]
        batches = [indices.split(micro_batch) for indices in batches]
        plan = [indices.tolist() for batch in batches for indices in batch]
        canvases = train_set.canvases(plan, device, args.workers)
        for step, batch in enumerate(batches, epoch * steps_per_epoch):
            lr = learning_rate(step, steps, settings["lr"])
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            # router noise depends on seed, step and process alone: a resumed run repeats it
            torch.manual_seed(settings["seed"] * 1_000_003 + step * world + rank)

            # a canvas: images and truth at full size, padded to one; `warp` augments and scales them
            micro_batches = [data.warp(*next(canvases), config.image, settings["mean_std"], config.tasks,
                                       warps[indices]) for indices in batch]
            # losses divide by the pixels of the effective batch, wherever its images are
            pixels = sum(evaluate.count_pixels(micro.targets) for micro in micro_batches)
            if world > 1:
                dist.all_reduce(pixels)

            step_losses = 0
            for micro in micro_batches:
                network.require_backward_grad_sync = micro is micro_batches[-1]  # read by DDP
                with data.autocast(device):
                    predictions, routing = network(micro.images)
                losses = evaluate.losses(predictions, micro.targets, pixels)
                loss = sum(loss_weights[task] * losses[task] for task in losses)
                # Mod-Squad: − mi × I(task; expert), so that tasks specialise; by this micro-batch's share
                information = ase.mutual_information(routing.probs).sum()
                loss = loss - settings["mi"] * information * len(micro.images) / batch_size
                (loss * world).backward()  # losses divide by global counts: × world undoes DDP's mean
                step_losses = step_losses + torch.stack(list(losses.values())).detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.step(step, step_losses, lr, norm)

        val_losses, routing = validate(model, val_set, settings, args.workers, rank, world)
        cosines = conflict(model, train_set, settings, micro_batch) if args.conflict and rank == 0 else None
        log.epoch(epoch + 1, val_losses, routing, cosines)
        if rank == 0:
            state = {"model": extended | model.state_dict(), "optimizer": optimizer.state_dict(),
                     "epoch": epoch + 1}
            data.write_atomically(out / "checkpoint.pt", lambda file: torch.save(state, file))
    if rank == 0:
        log.finish(device)


@torch.inference_mode()
def validate(model, dataset, settings, workers, rank=0, world=1):
    """({task: loss}, `ase.Routing`) over a split, as the model is used: in eval mode, without noise.

    Every pixel with ground truth counts the same in a loss, whichever process sees it (but saliency's classes
    are balanced in each batch); what the routers did is a mean over images and tokens.
    """
    model.eval()
    config, device = model.config, next(model.parameters()).device
    plan = [indices.tolist() for indices in torch.arange(len(dataset)).split(settings["batch"])]
    blocks, tasks = sum(block.experts is not None for block in model.blocks), len(config.tasks)
    losses, pixels = torch.zeros(2, tasks, device=device)
    sizes = (config.experts - config.shared, config.experts, 2) if blocks else (0, 0, 0)
    total = ase.Routing(*(torch.zeros(blocks, tasks, size, device=device) for size in sizes))
    for canvas in dataset.canvases(plan[rank::world], device, workers):
        batch = data.warp(*canvas, config.image, settings["mean_std"], config.tasks)
        with data.autocast(device):
            predictions, routing = model(batch.images)
        counts = evaluate.count_pixels(batch.targets)
        losses += torch.stack([*evaluate.losses(predictions, batch.targets, counts).values()]) * counts[:, 0]
        pixels += counts[:, 0]
        for mean, x in zip(total, routing):
            mean += x * (len(batch.images) / len(dataset))
    if world > 1:
        for x in (losses, pixels, *total):
            dist.all_reduce(x)
    return dict(zip(config.tasks, (losses / pixels.clamp(min=1)).tolist())), total


def conflict(model, dataset, settings, micro_batch):
    """How far tasks pull what they share into different directions: {part: cosines (T, T) of the gradients of
    their losses}, negative where a step for one harms another (Yu et al. 2020).

    On the first images of the data set, unchanged, in eval mode. Weights of losses change no angle. Parts:
    LoRA, shared and sparse experts; the backbone where it is trained.
    """
    model.eval()
    config, device = model.config, next(model.parameters()).device
    common = {name: p for name, p in model.named_parameters()
              if p.requires_grad and ase.part(name) in ("backbone", "LoRA", "experts")}
    sums = [[torch.zeros_like(p) for p in common.values()] for _ in config.tasks]
    plan = [indices.tolist() for indices in torch.arange(min(CONFLICT, len(dataset))).split(micro_batch)]
    batches = [data.warp(*canvas, config.image, settings["mean_std"], config.tasks)
               for canvas in dataset.canvases(plan, device)]
    pixels = sum(evaluate.count_pixels(batch.targets) for batch in batches)
    for batch in batches:
        with data.autocast(device):
            predictions, _ = model(batch.images)
        for total, loss in zip(sums, evaluate.losses(predictions, batch.targets, pixels).values()):
            for s, g in zip(total, torch.autograd.grad(loss, [*common.values()], retain_graph=True)):
                s += g
    parts = {}  # part → its parameters' gradients, (T, numbers) each
    for name, *gradients in zip(common, *sums):
        g, part, cut = torch.stack(gradients), ase.part(name), config.shared             # (T, …)
        pieces = {part: g}
        if part == "experts":
            pieces = {"shared experts": g[:, :cut], "sparse experts": g[:, cut:]}
        for piece, x in pieces.items():
            parts.setdefault(piece, []).append(x.flatten(1))
    unit = {piece: F.normalize(torch.cat(x, 1), dim=1) for piece, x in parts.items()}
    cosines = {piece: x @ x.T for piece, x in unit.items()}  # a task without ground truth here: 0 with itself
    return {piece: x.tolist() for piece, x in cosines.items() if (x.diagonal() > 0).sum() > 1}


class Log:
    """The progress of a training: a line every LOG_EVERY steps and every epoch; log.jsonl has all of it."""

    def __init__(self, settings, args, first_epoch, steps_per_epoch, rank):
        self.settings, self.args, self.rank, self.path = settings, args, rank, Path(args.out) / "log.jsonl"
        self.tasks, self.steps_per_epoch = settings["tasks"].split(","), steps_per_epoch
        self.first_step, self.steps = first_epoch * steps_per_epoch, settings["epochs"] * steps_per_epoch
        self.recent = []                     # losses (T,) of the steps since the last record
        self.begin = self.mark = time.time()
        if rank == 0:  # what was logged after the last checkpoint is computed again
            kept = [r for r in evaluate.read_log(self.path.parent) if r["epoch"] <= first_epoch]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            data.write_atomically(self.path, lambda file: file.write(text.encode()))

    def header(self, model, loaded, train_set, val_set, device):
        c = model.config
        total, trained = (sum(n[i] for n in ase.count(model).values()) / 1e6 for i in (0, 1))
        gates = f"({c.experts}/{c.topk}/{c.shared}/{c.rank}) {c.gating} gates" if c.experts else "no experts"
        print(f"model      {gates}, LoRA {c.lora}; width {c.dim}, {c.depth} blocks, {c.image}×{c.image} in "
              f"patches of {c.patch}; {total:.2f} M parameters, {trained:.2f} M trained")
        print(f"weights    {loaded}")
        if c.experts and len(c.tasks) == 1:
            print("routers    without mutual information: that of one task alone is 0")
        print(f"data       {train_set.root}: {len(train_set)} images in {self.steps_per_epoch} steps an "
              f"epoch; validation losses on {len(val_set)}")
        print(f"device     {device}, {data.precision(device)}\n".replace("torch.", ""))
        print(f"{'done':>5}{'step':>8}" + "".join(f"{task:>12}" for task in c.tasks)
              + f"{'lr':>10}{'images/s':>10}{'left':>9}", flush=True)

    def diverged(self, told):
        slower = command_again(self.args, "--lr", f"{self.settings['lr'] / 3:.1e}")
        raise UserError(f"{told}; the last checkpoint, if there is one, is good; train again at a lower "
                        f"rate: {slower}")

    def tell(self, record, start, losses, end):
        """Print a line and keep a record."""
        if self.rank == 0:
            print(start + "".join(f"{loss:12.4f}" for loss in losses.values()) + end, flush=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def step(self, step, losses, lr, norm):
        """losses (T,) of this process, which add up over processes. Only a record waits for the GPU."""
        self.recent.append(losses)
        if len(self.recent) < LOG_EVERY and (step + 1) % self.steps_per_epoch:
            return
        losses = torch.stack(self.recent)                                                # (steps, T)
        if dist.is_initialized():
            dist.all_reduce(losses)
        if not losses.isfinite().all():
            at, task = (~losses.isfinite()).nonzero()[0].tolist()
            self.diverged(f"the {self.tasks[task]} loss is not finite at step {step + 2 - len(losses) + at}")
        losses = dict(zip(self.tasks, losses.mean(0).tolist()))
        now, done = time.time(), step + 1
        speed = len(self.recent) * self.settings["batch"] / (now - self.mark)
        left = (now - self.begin) / (done - self.first_step) * (self.steps - done)
        self.recent, self.mark = [], now
        record = {"kind": "step", "step": done, "epoch": done / self.steps_per_epoch, "losses": losses,
                  "lr": lr, "norm": float(norm), "images_per_second": speed}
        self.tell(record, f"{done / self.steps:5.0%}{done:8}", losses,
                  f"{lr:10.1e}{speed:10.1f}{data.duration(left):>9}")

    def epoch(self, epoch, losses, routing, cosines):
        """The validation losses {task: loss} after `epoch`, what the routers did there, and `conflict`."""
        if not all(map(math.isfinite, losses.values())):
            self.diverged(f"the validation losses are not finite after epoch {epoch}")
        shared = routing.gates[..., :self.settings["model"]["shared"]]
        record = {"kind": "epoch", "step": epoch * self.steps_per_epoch, "epoch": epoch, "val": losses,
                  "gates": routing.gates.tolist(), "shared_mass": shared.sum(-1).tolist(),
                  "mutual_information": ase.mutual_information(routing.probs).tolist(),
                  "scale": routing.power.sqrt().tolist()}  # of the experts' update, and of the FFN's
        end = "   validation"
        if cosines:
            record["conflict"] = cosines
            shares = (f"{part} {evaluate.opposed(x)[0]:.0%}" for part, x in cosines.items())
            end += "; opposed: " + ", ".join(shares)
        self.tell(record, f"epoch{epoch:8}", losses, end)
        self.mark = time.time()

    def finish(self, device):
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else math.nan
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        print(f"\ntrained in {data.duration(time.time() - self.begin)}; peak memory {peak / 2**30:.2f} GiB\n"
              f"{next_command(self.path.parent)}")


# --------------------------------------------------------------------- before the loop: what is there already


@contextlib.contextmanager
def locked(out):
    """Make the run folder and keep a second training out of it; the lock dies with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.register_at_fork(after_in_child=file.close)  # no child keeps it alive after a kill
        except BlockingIOError:
            raise UserError(f"another training is writing into {out}: wait until it ends, or name another "
                            "folder, --out DIR") from None
        data.remove_leavings(out)
        yield


def resume(out, settings, args):
    """The checkpoint of an interrupted run with these settings, or None. Raises UserError for another run."""
    path, anew = out / "checkpoint.pt", f"train anew: {command_again(args)}"
    if not path.is_file():  # nothing can be lost, whatever the flags
        visible = [file.name for file in out.glob("*") if not file.name.startswith(".")]
        if visible and "config.json" not in visible:
            raise UserError(f"{out} holds {visible[0]} and is no run folder: name another one, --out DIR")
        return None
    found, checkpoint = evaluate.open_run(out).settings, evaluate.load_checkpoint(path)
    if not settings.keys() <= found.keys():
        raise UserError(f"{out} was made by an earlier version: it can be judged, not continued; {anew}")
    for flag in (flag for flag in settings if flag != "model" and found[flag] != settings[flag]):
        if flag == "epochs" and checkpoint["epoch"] == found["epochs"]:
            raise UserError(f"{out} is finished: over its {found['epochs']} epochs the learning rate has "
                            f"come down to 0, so it cannot go on; {anew}")
        raise UserError(f"{out} holds a run with --{flag.replace('_', '-')} {found[flag]}, not "
                        f"{settings[flag]}: repeat its flags to go on with it, or {anew}")
    return checkpoint


def command_again(args, *changes):
    """The command of this training with changes, into a run folder that is not there yet."""
    out = args.out.rstrip("/")
    number = next(n for n in itertools.count(2) if not Path(f"{out}-{n}").exists())
    return "python train.py " + shlex.join([*args.argv, *changes, "--out", f"{out}-{number}"])


def next_command(out):
    return f"next: python evaluate.py {shlex.quote(str(out))}"


def prepare(settings, args, config):
    """The training images and those of the validation losses, parsed into the cache. Makes the demo."""
    root = Path(settings["data"])
    if args.data == "demo" and not root.exists():
        print("data       rendering the demo world into demo/", flush=True)
        data.make_demo(root)
    train_set, val_set = (data.PascalContext(root, split, config.image, config.tasks)
                          for split in ("train", "val"))
    val_set.ids = val_set.ids[::-(-len(val_set) // settings["val_images"])]
    for dataset in (train_set, val_set):
        dataset.cache = data.build_cache(root, dataset.ids, dataset.tasks, args.cache)
    return train_set, val_set


def pretrain(path, backbone, device):
    """Train a backbone on one task alone: which classes are in an image of the demo world. Writes `path`, in
    half precision, and beside it a .json that tells how; after a kill it goes on from its last epoch."""
    number, held_out, epochs, batch, peak, seed = PRETRAIN.values()
    side, partial = ase.BACKBONES[backbone]["image"], path.with_name(f"{path.name}.partial")
    if path.exists() or not path.parent.is_dir():
        raise UserError(f"cannot make {path}: it exists, or its folder doesn't; name another file")
    print(f"pretraining {backbone} on {number} images of their own, {epochs} epochs", flush=True)
    torch.manual_seed(seed)
    classes = len(data.VOC_CLASSES) - 1
    model = ase.ASE(ase.Config(**ase.BACKBONES[backbone], experts=0, tasks={"classes": classes})).to(device)
    classify = torch.nn.Linear(model.config.dim, classes).to(device)
    # The patch embedding stays random, as in MoCo v3 (Chen et al. 2021): F1 is better, and patches keep
    # detail that other tasks need. The strong decay keeps tokens small, so that adapters can change them.
    model.patch_embed.requires_grad_(False)
    vit = [p for name, p in model.named_parameters() if ase.part(name) == "backbone"]
    parameters = [p for p in (*vit, *classify.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.3, fused=True)
    saved = {"model": model, "classify": classify, "optimizer": optimizer}
    steps, first_epoch, seconds = number // batch, 0, 0.0
    if partial.is_file():
        with data.reading(partial, "delete it to start anew"):
            state = ase.load(partial)
            for name in saved:
                saved[name].load_state_dict(state[name])
            first_epoch, seconds = state["epoch"], state["seconds"]
    # seeds that no scene of a demo has
    seeds = range(10 ** 9, 10 ** 9 + number + held_out)
    scenes = list(data.parallel(data.scene_classes, [(seed, side) for seed in seeds], "render"))
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in scenes])  # (n, 3, S, S)
    present = torch.stack([torch.from_numpy(classes) for _, classes in scenes]).float()      # (n, 20)
    del scenes

    def logits(x):
        x = data.normalise(x.to(device).float(), "imagenet")
        return classify(model.features(x)[0][0].mean(1))

    for epoch in range(first_epoch, epochs):
        began, total = time.time(), 0.0
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(number, generator=generator)[:steps * batch].split(batch)
        for step, indices in enumerate(data.progress(order, steps, f"epoch {epoch + 1}"), epoch * steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps * epochs, peak)
            mirrored = (torch.rand(batch, generator=generator) < 0.5).view(-1, 1, 1, 1)
            x = torch.where(mirrored, images[indices].flip(3), images[indices])
            loss = F.binary_cross_entropy_with_logits(logits(x), present[indices].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds += time.time() - began
        print(f"epoch {epoch + 1:2}   loss {total / steps:.4f}   {data.duration(seconds)}", flush=True)
        state = {name: saved[name].state_dict() for name in saved} | {"epoch": epoch + 1, "seconds": seconds}
        data.write_atomically(partial, lambda file: torch.save(state, file))
    with torch.inference_mode():
        rest = torch.arange(number, number + held_out)
        found = torch.cat([logits(images[i]) for i in rest.split(batch)]).cpu() > 0
    truth = present[rest] > 0
    occur = truth.any(0)  # the demo has 9 of the 20 classes
    found, truth = found[:, occur], truth[:, occur]
    f1 = (2 * (found & truth).sum(0) / (found.sum(0) + truth.sum(0)).clamp(min=1)).mean().item()
    told = PRETRAIN | {"backbone": backbone, "accuracy": (found == truth).float().mean().item(), "f1": f1,
                       "seconds": round(seconds), "torch": torch.__version__}
    print(f"which of {truth.shape[1]} classes are in an image: accuracy {told['accuracy']:.1%}, mean F1 "
          f"{f1:.1%} on {held_out} held out; kept as {path}")
    data.write_json(path.with_suffix(".json"), told)
    state = {name: p.half() for name, p in model.state_dict().items() if ase.part(name) == "backbone"}
    data.write_atomically(path, lambda file: torch.save(state, file))
    partial.unlink()


# ------------------------------------------------------------------------------------------ python train.py


def resolve(args, world):
    """All that decides the trained weights, from flags and the data's defaults: what config.json holds; and
    what the model starts from: `ase.Pretrained`, the state dict of the run that it extends, or None.

    Flags and files are checked here, before anything is made. Raises UserError or ValueError.
    """
    base = evaluate.open_run(args.extend) if args.extend else None
    args.data = args.data or (base.settings["data"] if base else "demo")
    root = Path(args.data).resolve()
    to_make = args.data == "demo" and not root.exists()
    is_demo = to_make or (root / "demo.json").is_file()
    settings = PAPER | (DEMO if is_demo else PASCAL) | {"extend": None}
    settings |= {flag: getattr(args, flag) for flag in PAPER | DEMO if getattr(args, flag, None) is not None}
    images = data.DEMO["train"]
    if not to_make:
        train_ids, val_ids = (data.read_ids(args.data, split) for split in ("train", "val"))
        images, both = len(train_ids), sorted(set(train_ids) & set(val_ids))
        if both:
            raise UserError(f"{both[0]} is in both train.txt and val.txt of {root} ({len(both)} such ids): "
                            "remove it from one")
    known = ase.Config(tasks={task: TASKS[task].channels for task in TASKS})
    there = base.config.tasks if base else {}
    tasks = [task for task in TASKS if task not in there]
    if args.tasks:
        tasks = list(evaluate.with_tasks(known, args.tasks).tasks)
    if args.conflict and (base or len(tasks) < 2):
        raise UserError("--conflict compares gradients of what tasks share: expected two tasks or more, and "
                        "no --extend")
    more, initial = extend(base, args, tasks) if base else start(args, tasks, settings, is_demo)
    settings |= more
    if settings["batch"] > images or settings["batch"] % world:
        raise UserError(f"--batch {settings['batch']}: expected at most the {images} training images, and a "
                        f"multiple of the {world} processes")
    return settings | {"data": str(root), "tasks": ",".join(tasks)}, initial


def start(args, tasks, settings, is_demo):
    """What decides the model of a new run, resolved flags and "model"; and its pretrained weights."""
    own = is_demo and settings["backbone"] == DEMO["backbone"]
    weights = args.weights or (str(OWN_BACKBONE) if own else None)
    if not weights:
        raise UserError(f"no weights for {settings['backbone']}: a frozen random backbone is no experiment; "
                        "name pretrained ones, --weights FILE (README tells where from), or mean it: "
                        "--weights none")
    pretrained = None if weights == "none" else ase.read_backbone(weights)
    backbone = settings["backbone"]
    if pretrained and not args.backbone:
        backbone = ase.backbone_for(pretrained)
    shape = ase.BACKBONES[backbone] | ({"image": args.size} if args.size else {})
    channels = {task: TASKS[task].channels for task in tasks}
    config = ase.Config(**shape, tasks=channels, **{flag: settings[flag] for flag in MODEL})
    if pretrained:
        with torch.device("meta"):  # nothing but shapes: a check of the file
            model = ase.ASE(config)
        ase.load_backbone(model, pretrained)
    weights = str(Path(weights).resolve()) if pretrained else "none"
    return {"backbone": backbone, "weights": weights, "size": config.image, "lora": config.lora,
            "model": asdict(config)}, pretrained


def extend(base, args, tasks):
    """The same for a finished run's model, to which tasks are added; and its state dict."""
    if base.folder.resolve() == Path(args.out).resolve():
        raise UserError(f"--out {args.out} is the run to be extended, which stays as it is: name another one")
    kept = {flag: getattr(base.config, flag) for flag in MODEL}
    kept |= {flag: base.settings[flag] for flag in ("backbone", "weights", "size", "mean_std")}
    for flag, value in kept.items():
        if getattr(args, flag) not in (None, value):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {base.folder} has {value}, "
                            "and its model stays as it is: leave the flag out")
    twice = [task for task in tasks if task in base.config.tasks]
    if twice or not tasks:
        rest = [task for task in TASKS if task not in base.config.tasks]
        raise UserError(f"{base.folder} has {twice[0] if twice else 'every task'} already: name a task that "
                        f"it lacks, --tasks {','.join(rest) or 'NAME'}")
    epoch = evaluate.load_checkpoint(base.folder / "checkpoint.pt")["epoch"]
    if epoch < base.settings["epochs"]:
        raise UserError(f"{base.folder} has trained for {epoch} of its {base.settings['epochs']} epochs: "
                        "finish it first, by the command that began it")
    state = evaluate.load_model(base, "cpu").state_dict()
    channels = {task: TASKS[task].channels for task in TASKS if task in tasks or task in base.config.tasks}
    config = replace(base.config, tasks=channels)
    flags = {flag: value for flag, value in base.settings.items() if flag != "model"}
    return kept | {"extend": str(base.folder.resolve()), "base": flags, "model": asdict(config)}, state


def number(kind, low, high=1_000_000):
    """An argparse type: a number, `kind` int or float, from `low` to `high`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {what} from {low} to {high}")
    return parse


def main(argv=None):
    def add(flag, text, **more):
        """A flag of `group`; the default that it has in PAPER, or in DEMO and PASCAL, is told."""
        name = flag[2:].replace("-", "_")
        if name in DEMO:
            text += f" (default {DEMO[name]} on a demo, {PASCAL[name]} elsewhere)"
        elif PAPER.get(name) is not None:
            text += f" (default {PAPER[name]})"
        group.add_argument(flag, help=text, **more)

    count, some = number(int, 0), number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.set_defaults(argv=sys.argv[1:] if argv is None else argv)

    group = parser.add_argument_group("the model")
    add("--experts", "experts in a layer, shared ones included; 0: none", type=count, metavar="N")
    add("--topk", "sparse experts active for a token, shared ones apart", type=count, metavar="K")
    add("--shared", "shared experts", type=count, metavar="S")
    add("--rank", "rank of an expert", type=count, metavar="R")
    add("--gating", "joint: one softmax over selected and shared experts, ASE; fixed: softmax before top-k, "
                    "shared gates are 1", choices=ase.GATINGS)
    add("--noise", "factor of the routers' learned noise in training; 0: none", type=number(float, 0),
        metavar="X")
    add("--mi", "weight of the mutual information loss, Mod-Squad's", type=number(float, 0), metavar="W")
    add("--lora", "rank of the backbone's LoRA; 0 trains it in full (default 4; without experts 0)",
        type=count, metavar="R")
    add("--tasks", f"some of {','.join(TASKS)} (default all)", metavar="A,B")
    add("--extend", "add --tasks to this finished run's model, which stays as it is: only their routers, "
                    "embeddings and heads are trained (data and model default to the run's)", metavar="RUN")
    add("--backbone", "shape of the ViT; given --weights decide it", choices=ase.BACKBONES)
    add("--weights", "pretrained ViT, .safetensors or torch.save; none: random (default a demo's own; needed "
                     "elsewhere)", metavar="FILE")
    add("--pretrain", "make the demo's backbone anew, as FILE, and nothing else: an hour", metavar="FILE")
    add("--mean-std", "the weights' normalisation: imagenet (DeiT, MAE, DINO) or half (timm's augreg, "
                      "Google's)", choices=data.MEAN_STD)

    group = parser.add_argument_group("the data")
    add("--data", "a folder in PASCAL-Context's layout; demo is made where missing (default demo)",
        metavar="DIR")
    add("--cache", "of parsed images (default cache/ in the data set)", metavar="DIR")
    add("--size", "side of the network's square input (default the backbone's, 96 or 224)", type=some,
        metavar="PIXELS")
    add("--workers", "processes that read ahead (default 4 with a GPU, else 0)", type=number(int, 0, 256),
        metavar="N")

    group = parser.add_argument_group("the training (the paper says no more than: 40 epochs)")
    add("--out", "the run folder (default run)", default="run", metavar="DIR")
    add("--epochs", "passes over the images", type=some, metavar="N")
    add("--batch", "images a step", type=some, metavar="N")
    add("--micro-batch", "images at a time on one device; gradients add up, router noise and mutual "
                         "information are each micro-batch's own (default all)", type=some, metavar="N")
    add("--lr", "highest learning rate", type=number(float, 1e-9), metavar="X")
    add("--seed", "of everything random", type=number(int, 0, 1_000_000_000), metavar="N")
    add("--conflict", "after each epoch, the angles between the tasks' gradients, for conflicts.png: takes "
                      f"as long as training on {2 * CONFLICT} images", action="store_true")
    add("--device", "cpu, cuda, … (default cuda where there is one)", metavar="NAME")
    add("--compile", "torch.compile the model", action="store_true")
    add("--checkpointing", "recompute each block in the backward pass: less memory, same gradients",
        action="store_true")
    return data.command(parser, run, argv)


def run(args):
    """Check everything, then train."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = data.pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    if args.pretrain:
        return pretrain(Path(args.pretrain), args.backbone or DEMO["backbone"], device)
    try:
        settings, initial = resolve(args, world)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.workers is None:
        args.workers = 4 if device.type == "cuda" else 0  # a CPU's step takes 100 times as long as reading
    torch.backends.cudnn.benchmark = True  # all batches have one size
    if world > 1:
        gpu = device if device.type == "cuda" else None
        if gpu:
            torch.cuda.set_device(gpu)
        # process 0 may render the demo and fill a cache while the others wait
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=6))
    try:
        with locked(Path(args.out)) if rank == 0 else contextlib.nullcontext():
            train(settings, initial, args, rank, world, device)
    except RuntimeError as error:
        if world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise UserError(f"process {rank} has lost the others: the line of the one that stopped first "
                            "tells why") from None
        raise
    if world > 1:  # not after an error: that would wait for the others
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
