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

The run folder holds config.json, log.jsonl and checkpoint.pt: with the data set, all that evaluate.py needs.
Every step's randomness is a function of the seed, the step and the process, so a run that was killed at any
moment and started again with the same command ends, on a CPU, in the same weights bit for bit.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
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
# What decides weights and log. It is kept in config.json, and a run goes on only where all of it is the same.
SETTINGS = (*PAPER, *DEMO, "size", "heads", "tasks", "start", "dataset")
PLACES = ("data", "weights", "extend")  # where files lie is kept, too, but they may move
WEIGHT_DECAY = 0.01
WARMUP = 0.05        # fraction of all steps
GRAD_CLIP = 10.0     # largest norm of the gradient
PRETRAINED_LR = 0.1  # pretrained weights that are trained (--lora 0): their factor of the learning rate
LOG_EVERY = 50       # steps
OWN_BACKBONE = Path(__file__).parent / "assets/vit_tiny.pt"  # the demo's, made by assets/backbone.py


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


def train(args, rank, world, device):
    """All of a run, as process `rank` of `world`. args: the flags, as `resolve` leaves them."""
    # -- the data
    if rank > 0:
        dist.barrier()  # process 0 renders the demo first
    elif args.to_make:
        print("data       rendering the demo world into demo/", flush=True)
        from assets.demo import make_demo
        make_demo(args.data)
    train_set, val_set = (data.PascalContext(args.data, split, args.size, args.tasks)
                          for split in ("train", "val"))
    for dataset in (train_set, val_set):
        dataset.require_files()
    if rank == 0 and world > 1:
        dist.barrier()
    val_set.ids = val_set.ids[::-(-len(val_set) // args.val_images)]
    args.dataset = data.fingerprint(args.data)
    micro_batch = args.micro_batch or args.batch // world  # args.batch: the effective one, of all processes
    steps_per_epoch = len(train_set) // args.batch
    steps = steps_per_epoch * args.epochs

    # -- the model
    checkpoint, out = resume(args), Path(args.out)
    first_epoch = checkpoint["epoch"] if checkpoint else 0
    if first_epoch == args.epochs:
        return print(f"{out} is finished, {args.epochs} epochs; next: python evaluate.py {out}")
    torch.manual_seed(args.seed)
    model = ase.ASE(args.config).to(device)
    model.checkpointing = args.checkpointing
    extended, loaded = {}, "random"
    if args.start == "extended":  # a run's model as it is, frozen: what is the new task's own starts fresh
        extended = (checkpoint or evaluate.load_checkpoint(Path(args.extend)))["model"]
        model.load_state_dict(extended, strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ase.part(name) in ase.OWN
        loaded = f"{args.extend}, all of it frozen; new: what {', '.join(args.tasks)} alone uses"
    elif args.start == "pretrained" and not checkpoint:
        loaded = ase.load_backbone(model, args.weights)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.start == "pretrained"), fused=True)
    if checkpoint:
        model.load_state_dict({name: checkpoint["model"][name] for name in model.state_dict()})
        optimizer.load_state_dict(checkpoint["optimizer"])
        loaded = f"{out}/checkpoint.pt, after {first_epoch} epochs"
    del checkpoint  # it is as large as the model
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = DistributedDataParallel(network)
    loss_weights = {task: TASKS[task].weight if len(args.tasks) > 1 else 1 for task in args.tasks}
    log = Log(args, first_epoch, steps_per_epoch, rank)
    log.header(model, loaded, len(train_set), len(val_set), device)

    # -- the loop
    for epoch in range(first_epoch, args.epochs):
        network.train()
        order, warps = shuffle(len(train_set), epoch, args.seed)
        # (steps, images): of each step's batch this process takes every world-th image, in micro-batches
        batches = order[:steps_per_epoch * args.batch].view(steps_per_epoch, args.batch)[:, rank::world]
        batches = [indices.split(micro_batch) for indices in batches]
        plan = [indices.tolist() for batch in batches for indices in batch]
        canvases = train_set.canvases(plan, device, args.workers)
        for step, batch in enumerate(batches, epoch * steps_per_epoch):
            lr = learning_rate(step, steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            # router noise depends on seed, step and process alone: a resumed run repeats it
            torch.manual_seed(args.seed * 1_000_003 + step * world + rank)

            # a canvas: images and truth at full size, padded to one; `warp` augments and scales them
            micro_batches = [data.warp(*next(canvases), args.size, args.mean_std, args.tasks, warps[indices])
                             for indices in batch]
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
                loss = loss - args.mi * information * len(micro.images) / args.batch
                (loss * world).backward()  # losses divide by global counts: × world undoes DDP's mean
                step_losses = step_losses + torch.stack(list(losses.values())).detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.step(step, step_losses, lr, norm)

        log.epoch(epoch + 1, *validate(model, val_set, args, rank, world))
        if rank == 0:
            state = {"model": extended | model.state_dict(), "optimizer": optimizer.state_dict(),
                     "epoch": epoch + 1}
            data.write_atomically(out / "checkpoint.pt", lambda file: torch.save(state, file))
    log.finish(device)


@torch.inference_mode()
def validate(model, dataset, args, rank=0, world=1):
    """({task: loss}, `ase.Routing`) over a split, as the model is used: in eval mode, without noise.

    Every pixel with ground truth counts the same in a loss, whichever process sees it (but saliency's classes
    are balanced in each batch); what the routers did is a mean over images and tokens.
    """
    model.eval()
    config, device = model.config, next(model.parameters()).device
    plan = [indices.tolist() for indices in torch.arange(len(dataset)).split(args.batch)]
    blocks, tasks = sum(block.experts is not None for block in model.blocks), len(config.tasks)
    losses, pixels = torch.zeros(2, tasks, device=device)
    sizes = (config.experts - config.shared, config.experts) if blocks else (0, 0)
    total = ase.Routing(*(torch.zeros(blocks, tasks, size, device=device) for size in sizes))
    for canvas in dataset.canvases(plan[rank::world], device, args.workers):
        batch = data.warp(*canvas, config.image, args.mean_std, config.tasks)
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


class Log:
    """The progress of a training: a line every LOG_EVERY steps and every epoch; log.jsonl has all of it."""

    def __init__(self, args, first_epoch, steps_per_epoch, rank):
        self.args, self.rank, self.path = args, rank, Path(args.out) / "log.jsonl"
        self.steps_per_epoch, self.first_step = steps_per_epoch, first_epoch * steps_per_epoch
        self.recent = []                     # losses (T,) of the steps since the last record
        self.begin = self.mark = time.time()
        if rank == 0:  # what was logged after the last checkpoint is computed again
            begin(args)
            kept = [r for r in evaluate.read_log(self.path.parent) if r["epoch"] <= first_epoch]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            data.write_atomically(self.path, lambda file: file.write(text.encode()))

    def tell(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

    def header(self, model, loaded, images, val_images, device):
        c = model.config
        total, trained = (sum(n[i] for n in ase.count(model).values()) / 1e6 for i in (0, 1))
        what = f"({c.experts}/{c.topk}/{c.shared}/{c.rank}) {c.gating} gates" if c.experts else "no experts"
        self.tell(f"model      {what}, LoRA {c.lora}; {c.depth} blocks of width {c.dim}, {c.image}×{c.image} "
                  f"in patches of {c.patch}; {total:.2f} M parameters, {trained:.2f} M trained\n"
                  f"weights    {loaded}; images normalised for them as {self.args.mean_std}\n"
                  f"data       {self.args.data}: {images} images in {self.steps_per_epoch} steps an epoch; "
                  f"validation losses on {val_images}\ndevice     {device}\n")
        self.tell(f"{'done':>5}{'step':>8}" + "".join(f"{task:>12}" for task in c.tasks)
                  + f"{'lr':>10}{'images/s':>10}{'left':>9}")

    def keep(self, record, start, end):
        """Print a line and keep its record. Raises UserError where a loss is not finite."""
        losses = record.get("losses") or record["val"]
        bad = [task for task, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            raise UserError(f"the {bad[0]} loss is not finite at step {record['step']}: try a lower --lr")
        self.tell(start + "".join(f"{loss:12.4f}" for loss in losses.values()) + end)
        if self.rank == 0:
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
        losses = dict(zip(self.args.tasks, losses.mean(0).tolist()))
        now, done = time.time(), step + 1
        speed = len(self.recent) * self.args.batch / (now - self.mark)
        steps = self.args.epochs * self.steps_per_epoch
        left = timedelta(seconds=round((now - self.begin) / (done - self.first_step) * (steps - done)))
        self.recent, self.mark = [], now
        record = {"kind": "step", "step": done, "epoch": done / self.steps_per_epoch, "losses": losses,
                  "lr": lr, "norm": float(norm), "images_per_second": speed}
        self.keep(record, f"{done / steps:5.0%}{done:8}", f"{lr:10.1e}{speed:10.1f}{str(left):>9}")

    def epoch(self, epoch, losses, routing):
        """The validation losses {task: loss} after `epoch`, and what the routers did there."""
        record = {"kind": "epoch", "step": epoch * self.steps_per_epoch, "epoch": epoch, "val": losses,
                  "gates": routing.gates.tolist(),
                  "mutual_information": ase.mutual_information(routing.probs).tolist()}
        self.keep(record, f"epoch{epoch:8}", "   validation")
        self.mark = time.time()

    def finish(self, device):
        if device.type == "cuda":
            self.tell(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
        self.tell(f"\ntrained in {timedelta(seconds=round(time.time() - self.begin))}\n"
                  f"next: python evaluate.py {self.args.out}")


# --------------------------------------------------------------------- before the loop: what is there already


def resume(args):
    """The checkpoint of the run in `args.out`, or None. Raises UserError for a run with other settings."""
    out = Path(args.out)
    if not (out / "checkpoint.pt").is_file():  # nothing can be lost, whatever the flags
        return None
    found = evaluate.open_run(out).settings
    for name in (*SETTINGS, "model"):
        if found.get(name) != getattr(args, name):
            raise UserError(f"{out} holds a run with {name} {found.get(name)}, not {getattr(args, name)}: "
                            "repeat its flags to go on with it, or name another folder, --out DIR")
    return evaluate.load_checkpoint(out)


def begin(args):
    """Make the run folder, without what a killed process left behind, and write config.json."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".*.tmp"):
        left.unlink()
    settings = {name: getattr(args, name) for name in (*SETTINGS, *PLACES)}
    data.write_json(out / "config.json", settings | {"model": args.model})


def extend(base, args):
    """Make the flags those of the finished run `base`, whose model stays as it is and gets new tasks."""
    for flag in (*MODEL, "backbone", "size", "heads", "mean_std"):
        value = base.settings[flag]
        if getattr(args, flag) not in (None, value):
            raise UserError(f"{base.folder} has {flag} {value}, not {getattr(args, flag)}: leave it out")
        setattr(args, flag, value)
    epoch = evaluate.load_checkpoint(base.folder)["epoch"]
    if epoch < base.settings["epochs"]:
        raise UserError(f"{base.folder} has trained for {epoch} of its {base.settings['epochs']} epochs")


def backbone(args, is_demo):
    """The fields of `ase.Config` that the ViT decides; sets `args.start`, `args.weights`, `args.backbone`."""
    name = args.backbone or (DEMO if is_demo else PASCAL)["backbone"]
    if is_demo and name == DEMO["backbone"]:
        args.weights = args.weights or str(OWN_BACKBONE)
    if not args.weights:
        raise UserError("no weights: a frozen random backbone is no experiment; name pretrained ones, "
                        "--weights FILE (README tells where from), or mean it: --weights none")
    args.start, shape = "random", ase.BACKBONES[name]
    if args.weights != "none":
        args.start = "pretrained"
        if Path(args.out, "checkpoint.pt").is_file():
            model = evaluate.open_run(args.out).settings["model"]
            shape = {field: model[field] for field in (*shape, "registers")}
        else:
            shape = ase.shape_of(args.weights)
        sizes = "width {dim}, {depth} blocks, patch {patch}"
        names = [name for name, row in ase.BACKBONES.items() if sizes.format(**row) == sizes.format(**shape)]
        if args.backbone not in (None, *names):
            raise UserError(f"--backbone {args.backbone}: the weights have {sizes.format(**shape)}")
        name = names[0] if names else sizes.format(**shape)
    args.backbone = name
    return shape | {field: x for field, x in (("image", args.size), ("heads", args.heads)) if x}


def resolve(args, world):
    """Give every flag its value in this run, from defaults and data; from here on `args` is read by name.

    New in it are `to_make` (whether the demo must be rendered), `start` (what the model starts from: random,
    pretrained or extended), `config` (the `ase.Config` of what is trained) and `model` (the fields of that of
    the finished model). Flags and files are checked before anything is made. Raises UserError, ValueError.
    """
    visible = [file.name for file in Path(args.out).glob("[!.]*")]
    if visible and "config.json" not in visible:
        raise UserError(f"{args.out} holds {visible[0]} and is no run folder: name another one, --out DIR")
    base = evaluate.open_run(args.extend) if args.extend else None
    if base:
        extend(base, args)
    args.data = args.data or (base.settings["data"] if base else "demo")
    args.to_make = args.data == "demo" and not Path("demo").exists()
    is_demo = args.to_make or Path(args.data, "demo.json").is_file()
    args.data = str(Path(args.data).resolve())
    images = data.DEMO["train"] if args.to_make else len(data.read_ids(args.data, "train"))
    for flag, value in (PAPER | (DEMO if is_demo else PASCAL)).items():
        if getattr(args, flag, None) is None and flag != "backbone":
            setattr(args, flag, value)
    if args.batch > images or args.batch % world:
        raise UserError(f"--batch {args.batch}: at most the {images} images, a multiple of {world} processes")

    known, there = {task: t.channels for task, t in TASKS.items()}, base.config.tasks if base else {}
    tasks = evaluate.choose({task: n for task, n in known.items() if task not in there}, args.tasks)
    if base:
        args.start = "extended"
        whole = replace(base.config, tasks={task: known[task] for task in known if task in there | tasks})
    else:
        shape = backbone(args, is_demo)
        whole = ase.Config(**shape, tasks=tasks, **{flag: getattr(args, flag) for flag in MODEL})
    args.tasks, args.size, args.heads, args.lora = [*tasks], whole.image, whole.heads, whole.lora
    args.config, args.model = replace(whole, tasks=tasks), asdict(whole)
    if args.start == "pretrained" and not Path(args.out, "checkpoint.pt").is_file():
        with torch.device("meta"):  # nothing but shapes: a check of the file
            model = ase.ASE(args.config)
        ase.load_backbone(model, args.weights)


# ------------------------------------------------------------------------------------------ python train.py


def number(kind, low, high=1_000_000):
    """An argparse type: a number, `kind` int or float, from `low` to `high`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {kind.__name__}, {low} to {high}")
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
    group = parser.add_argument_group("the model")
    add("--experts", "experts in a layer, shared ones included; 0: none", type=count, metavar="N")
    add("--topk", "sparse experts active for a token, shared ones apart", type=count, metavar="K")
    add("--shared", "shared experts", type=count, metavar="S")
    add("--rank", "rank of an expert", type=count, metavar="R")
    add("--gating", "joint: one softmax, ASE; fixed: before top-k, shared gates are 1", choices=ase.GATINGS)
    add("--noise", "factor of the routers' learned noise; 0: none", type=number(float, 0), metavar="X")
    add("--mi", "weight of the mutual information loss, Mod-Squad's", type=number(float, 0), metavar="W")
    add("--lora", "rank of the backbone's LoRA; 0: train all of it (default 4)", type=count, metavar="R")
    add("--tasks", f"some of {','.join(TASKS)} (default all)", metavar="A,B")
    add("--extend", "add --tasks to this finished run's model, which stays as it is", metavar="RUN")
    add("--backbone", "shape of a random ViT; pretrained weights have theirs", choices=ase.BACKBONES)
    add("--heads", "attention heads; no file tells it (default as published)", type=some, metavar="N")
    add("--weights", "pretrained ViT; none: random (default a demo's own; needed elsewhere)", metavar="FILE")
    add("--mean-std", "the weights' normalisation; half: timm's augreg, Google's", choices=data.MEAN_STD)

    group = parser.add_argument_group("the data")
    add("--data", "in PASCAL-Context's layout; demo is made where missing (default demo)", metavar="DIR")
    add("--size", "side of the input, pixels (default the backbone's, 96 or 224)", type=some, metavar="N")
    add("--workers", "processes that read images (default 0, with a GPU up to 8)", type=count, metavar="N")

    group = parser.add_argument_group("the training (the paper says no more than: 40 epochs)")
    add("--out", "the run folder (default run)", default="run", metavar="DIR")
    add("--epochs", "passes over the images", type=some, metavar="N")
    add("--batch", "images a step", type=some, metavar="N")
    add("--micro-batch", "images at a time on one device (default all)", type=some, metavar="N")
    add("--lr", "highest learning rate", type=number(float, 1e-9), metavar="X")
    add("--seed", "of everything random", type=number(int, 0, 1_000_000_000), metavar="N")
    add("--device", "cpu, cuda, … (default cuda where there is one)", metavar="NAME")
    add("--compile", "torch.compile the model", action="store_true")
    add("--checkpointing", "recompute each block in the backward pass, for memory", action="store_true")
    return data.command(parser, run, argv)


def run(args):
    started = ("RANK", "WORLD_SIZE") if "LOCAL_RANK" in os.environ else ()  # by torchrun
    rank, world = [int(os.environ[name]) for name in started] or (0, 1)
    if world > 1 and args.device in (None, "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = data.pick_device(args.device)
    try:
        resolve(args, world)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.workers is None:  # a CPU's step takes 50 times as long as reading its images
        args.workers = min(8, data.cores()) if device.type == "cuda" else 0
    torch.backends.cudnn.benchmark = True  # all batches have one size
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(args, rank, world, device)
    if world > 1:  # not after an error: that would wait for the others
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
