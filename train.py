"""Train a model on dense tasks into a run folder, or continue what was interrupted there.

    python train.py --experts 32 --topk 6 --shared 2 --rank 2         ASE, on the demo, made where missing
    python train.py --gating fixed --shared 0 --topk 4                vanilla LoRA-MoE, the paper's baseline
    python train.py --gating fixed                                    naive shared expert: its gate is 1
    python train.py --gating joint --shared 0 --topk 4                the control that the paper lacks
    python train.py --experts 0                                       the plain multi-task ViT
    python train.py --experts 0 --tasks semseg                        a single-task model
    python train.py --data PASCAL_MT --weights vit_base.safetensors   the paper's setting
    torchrun --nproc_per_node=8 train.py …                            the same on several GPUs

The run folder holds config.json, log.jsonl (a record every few steps and every epoch) and checkpoint.pt: with
the data set, all that evaluate.py needs. Every step's randomness is a function of the seed, the step and the
process, so a run that was killed at any moment and started again with the same command ends, on a CPU, in the
same weights bit for bit.
"""

import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # there are none on Windows
    fcntl = resource = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import ase
import data
import evaluate
from data import TASKS, UserError

# What the paper does not say is ours: optimiser, learning rate, warm-up, clipping.
DEFAULTS = {
    "demo": dict(backbone="vit_tiny", epochs=11, batch=8, lr=2e-3, val_subset=50),
    "pascal": dict(backbone="vit_base", epochs=40, batch=32, lr=5e-4, val_subset=500),
}
WEIGHT_DECAY = 0.01
WARMUP = 0.05        # share of all steps
CLIP = 10.0          # largest norm of the gradient
PRETRAINED_LR = 0.1  # pretrained weights that are trained (--lora 0) move at this share of the learning rate
LOG_EVERY = 10       # steps


def learning_rate(step, steps, peak):
    """Linear warm-up, then a cosine to zero: like poly, but with no exponent to choose."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def parameter_groups(model, pretrained):
    """The optimiser's groups, [{"params", "share", "weight_decay"}]; share: of the learning rate.

    Weight decay acts on matrices, as in nanoGPT: not on biases and norms, nor on what a task's embedding is.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = PRETRAINED_LR if pretrained and ase.part(name) == "backbone" else 1.0
            decays = parameter.dim() >= 2 and ase.part(name) != "embeddings"
            groups.setdefault((share, WEIGHT_DECAY if decays else 0.0), []).append(parameter)
    return [{"params": parameters, "share": share, "weight_decay": decay}
            for (share, decay), parameters in groups.items()]


def shuffle(number, epoch, seed):
    """Order and augmentation of an epoch's images, the same on any number of processes."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(number, generator=generator).tolist(), data.random_warps(number, generator)


@contextlib.contextmanager
def first(rank):
    """Process 0 does what is inside before the others do it."""
    if rank:
        dist.barrier()
    yield
    if rank == 0 and dist.is_initialized():
        dist.barrier()


def train(settings, args, rank, world, device):
    root, out, config = Path(settings["data"]), Path(args.out), ase.Config(**settings["model"])
    checkpoint = resume(out, settings, args)
    if checkpoint and checkpoint["epoch"] == settings["epochs"]:
        return print(f"{out} is finished, {settings['epochs']} epochs; {next_step(out)}")
    if rank == 0:
        if not checkpoint and (out / "config.json").exists():
            print(f"{out} held a run without a checkpoint: it starts again")
        data.write_json(out / "config.json", settings)

    # -- the data
    with first(rank):
        prepare(settings, args, device)
        splits = {split: data.PascalContext(root, split, config.image, config.tasks)
                  for split in ("train", "val")}
        splits["val"].ids = splits["val"].ids[::-(-len(splits["val"]) // settings["val_subset"])]
        for dataset in splits.values():
            dataset.cache = data.build_cache(root, dataset.ids, config.tasks, args.cache)
    workers = args.workers if args.workers is not None else 4 if device.type == "cuda" else 0
    batch = settings["batch"]
    steps = len(splits["train"]) // batch                                                # in an epoch

    # -- the model
    torch.manual_seed(settings["seed"])
    model = ase.ASE(config).to(device)
    model.checkpointing = args.checkpointing
    pretrained = settings["weights"] != "none"
    loaded = "random weights"
    if pretrained:
        loaded = ase.load_backbone(model, args.pretrained or settings["weights"])
    optimizer = torch.optim.AdamW(parameter_groups(model, pretrained), fused=True)
    start = 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["epoch"]
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = DistributedDataParallel(network)
    weights = {task: TASKS[task].weight if len(config.tasks) > 1 else 1 for task in config.tasks}
    del checkpoint  # as large as the model
    log = Log(out, settings, args, start, steps, rank)
    log.header(config, model, splits, loaded, device)

    # -- the loop
    for epoch in range(start, settings["epochs"]):
        order, warps = shuffle(len(splits["train"]), epoch, settings["seed"])
        # every step takes its own `batch` images; this process its share of them, in micro-batches
        mine = [order[n * batch:(n + 1) * batch][rank::world] for n in range(steps)]
        micro = args.micro_batch or len(mine[0])
        plan = [[share[i:i + micro] for i in range(0, len(share), micro)] for share in mine]
        loader = splits["train"].canvases([m for share in plan for m in share], device, workers)
        network.train()
        for n, share in enumerate(plan):
            step = epoch * steps + n
            lr = learning_rate(step, steps * settings["epochs"], settings["lr"])
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            torch.manual_seed(settings["seed"] * 1_000_003 + step * world + rank)        # the routers' noise
            canvases = list(itertools.islice(loader, len(share)))
            log.lap("waiting for data")
            parts = [data.warp(*canvas, config.image, settings["mean_std"], config.tasks, warps[indices])
                     for canvas, indices in zip(canvases, share)]
            log.lap("augmentation")
            # losses divide by the pixels of the whole batch, wherever its images are
            counts = sum(evaluate.count_pixels(part.targets) for part in parts)
            if world > 1:
                dist.all_reduce(counts)
            for m, part in enumerate(parts):
                alone = contextlib.nullcontext() if world == 1 or m == len(parts) - 1 else network.no_sync()
                with alone:
                    with data.autocast(device):
                        predictions, routing = network(part.images)
                    log.lap("forward")
                    losses = evaluate.losses(predictions, part.targets, counts)
                    # Mod-Squad's regulariser: more mutual information of tasks and experts, less loss
                    information = ase.mutual_information(routing.probs)
                    loss = sum(weights[task] * losses[task] for task in losses)
                    loss = loss - settings["mi"] * information.sum() * len(part.images) / batch
                    (loss * world).backward()  # processes are averaged
                    log.lap("losses, backward")
                log.add(losses)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.lap("optimiser")
            log.step(step, lr, norm)
        val, routing = validate(model, splits["val"], settings, workers, rank, world)
        log.epoch(epoch, val, routing, config.shared)
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            data.write_atomically(out / "checkpoint.pt", lambda file: torch.save(state, file))
        log.lap("validation, checkpoint")
    log.finish(out, device)


class Log:
    """What a training tells: a line every LOG_EVERY steps and every epoch, and log.jsonl with all of it."""

    def __init__(self, out, settings, args, start, steps, rank):
        self.path, self.args, self.rank, self.peak = out / "log.jsonl", args, rank, settings["lr"]
        self.epochs, self.steps, self.batch = settings["epochs"], steps, settings["batch"]
        self.first_step = start * steps
        if rank == 0:
            # what was logged after the last checkpoint is computed again
            kept = [r for r in evaluate.read_log(out) if r["epoch"] <= start]
            data.write_atomically(self.path, lambda file: file.writelines(map(_line, kept)))
        self.begin = self.mark = self.last = time.time()
        self.stages = collections.Counter()
        self.tasks = list(settings["model"]["tasks"])
        self.losses, self.recent = 0, []

    def write(self, record):
        with open(self.path, "ab") as file:
            file.write(_line(record))

    def header(self, config, model, splits, loaded, device):
        if self.rank:
            return
        total, trained = (sum(n[i] for n in ase.count(model).values()) / 1e6 for i in (0, 1))
        experts = (f"({config.experts}/{config.topk}/{config.shared}/{config.rank}) {config.gating} gates"
                   if config.experts else "no experts")
        print(f"model      {experts}, LoRA {config.lora}; width {config.dim}, "
              f"{config.depth} blocks, {config.image}×{config.image} in patches "
              f"of {config.patch}; {total:.2f} M parameters, {trained:.2f} M trained")
        print(f"weights    {loaded}")
        print(f"data       {splits['train'].root}: {len(splits['train'])} images in {self.steps} steps an "
              "epoch; "
              f"validation losses on {len(splits['val'])}")
        print(f"device     {device}, {'bfloat16' if data.has_bfloat16(device) else 'float32'}\n")
        print(f"{'done':>5}{'step':>8}" + "".join(f"{task:>12}" for task in config.tasks)
              + f"{'lr':>10}{'images/s':>10}{'left':>9}", flush=True)

    def lap(self, stage):
        """The time since the last lap went into `stage`. A GPU works on by itself: there it is the CPU's."""
        now = time.time()
        self.stages[stage] += now - self.last
        self.last = now

    def add(self, losses):
        """Add up what the micro-batches of a step bring; no wait for the device here."""
        self.losses = self.losses + torch.stack(list(losses.values())).detach()

    def step(self, step, lr, norm):
        """A line for the mean of the last LOG_EVERY steps. Raises UserError for a loss that is not finite."""
        self.recent.append(self.losses)
        self.losses = 0
        number = len(self.recent)
        if number < LOG_EVERY and (step + 1) % self.steps:
            return
        losses = torch.stack(self.recent)                                                # (steps, T)
        self.recent = []
        if dist.is_initialized():
            dist.all_reduce(losses)
        if not losses.isfinite().all():
            at, task = (~losses.isfinite()).nonzero()[0].tolist()
            self.diverged(f"the {self.tasks[task]} loss is not finite at step {step + 2 - number + at}")
        if self.rank:
            return
        losses = dict(zip(self.tasks, losses.mean(0).tolist()))
        now, done, total = time.time(), step + 1, self.steps * self.epochs
        speed = number * self.batch / (now - self.mark)
        left = (now - self.begin) / (done - self.first_step) * (total - done)
        self.mark = now
        print(f"{done / total:5.0%}{done:8}" + "".join(f"{loss:12.4f}" for loss in losses.values())
              + f"{lr:10.1e}{speed:10.1f}{data.duration(left):>9}", flush=True)
        self.write({"kind": "step", "step": done, "epoch": done / self.steps, "losses": losses, "lr": lr,
                    "norm": float(norm), "images_per_second": speed})

    def epoch(self, epoch, val, routing, shared):
        """The epoch's validation losses, and what the routers did there: means over images and tokens."""
        if not all(map(math.isfinite, val.values())):
            self.diverged(f"the validation losses are not finite after epoch {epoch + 1}")
        self.mark = time.time()
        if self.rank:
            return
        print(f"{'epoch':>5}{epoch + 1:8}" + "".join(f"{loss:12.4f}" for loss in val.values())
              + "   validation", flush=True)
        self.write({"kind": "epoch", "epoch": epoch + 1, "step": (epoch + 1) * self.steps, "val": val,
                    "gates": routing.gates.tolist(),
                    "shared_mass": routing.gates[..., :shared].sum(-1).tolist(),
                    "mutual_information": ase.mutual_information(routing.probs).tolist()})

    def diverged(self, told):
        last = self.path.with_name("checkpoint.pt")
        raise UserError(f"{told}; last good checkpoint: {last if last.is_file() else 'none yet'}; train again "
                        f"at a lower rate: {again(self.args, '--lr', self.peak / 3)}")

    def finish(self, out, device):
        if self.rank == 0:
            spent = time.time() - self.begin
            print(f"\ntrained in {data.duration(spent)}, peak memory {peak_memory(device) / 2**30:.2f} GiB: "
                  + ", ".join(f"{stage} {t / spent:.1%}" for stage, t in self.stages.items())
                  + f"\n{next_step(out)}")


def _line(record):
    return (json.dumps(record) + "\n").encode()


def peak_memory(device):
    """The most bytes held so far: of tensors on a GPU, else of this process; 0 where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0


@torch.inference_mode()
def validate(model, dataset, settings, workers, rank=0, world=1):
    """{task: loss} and `ase.Routing` over a split, as the model is used: without noise.

    Every pixel with ground truth counts the same in a loss, whichever process sees it (but saliency's classes
    are balanced in each batch); what the routers did is a mean over images and tokens.
    """
    model.eval()
    config, device = model.config, next(model.parameters()).device
    plan = [indices.tolist() for indices in torch.arange(len(dataset)).split(settings["batch"])]
    losses, pixels = torch.zeros(2, len(config.tasks), device=device)
    layers = sum(block.experts is not None for block in model.blocks)
    gates = torch.zeros(layers, len(config.tasks), config.experts, device=device)
    probs = torch.zeros(layers, len(config.tasks), config.experts and config.experts - config.shared,
                        device=device)
    for canvas in dataset.canvases(plan[rank::world], device, workers):
        batch = data.warp(*canvas, config.image, settings["mean_std"], config.tasks)
        with data.autocast(device):
            predictions, routing = model(batch.images)
        counts = evaluate.count_pixels(batch.targets)
        found = torch.stack(list(evaluate.losses(predictions, batch.targets, counts).values()))
        losses += found * counts[:, 0]
        pixels += counts[:, 0]
        gates += routing.gates * len(batch.images)
        probs += routing.probs * len(batch.images)
    if world > 1:
        for total in (losses, pixels, gates, probs):
            dist.all_reduce(total)
    losses = dict(zip(config.tasks, (losses / pixels.clamp(min=1)).tolist()))
    return losses, ase.Routing(probs / len(dataset), gates / len(dataset))


# --------------------------------------------------------------------- before the loop: what is there already


@contextlib.contextmanager
def locked(out):
    """Keep a second training out of the run folder, which is made; the lock dies with the process."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder for the run, --out DIR")
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write {out}: {parent} cannot be written; name another folder, --out DIR")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another training is writing into {out}: wait until it ends, or name another "
                            "folder, --out DIR") from None
        data.remove_leavings(out)
        yield


def resume(out, settings, args):
    """The checkpoint of an interrupted run with these settings, or None. Raises UserError for another run.

    A run that never came to its first checkpoint has nothing to lose: whatever its flags were, it is replaced.
    """
    path = out / "checkpoint.pt"
    if not path.is_file():
        visible = [file.name for file in out.glob("*") if not file.name.startswith(".")]
        if visible and "config.json" not in visible:
            raise UserError(f"{out} holds {visible[0]} and is no run folder: name another one, --out DIR")
        return None
    found = evaluate.open_run(out).settings
    checkpoint = evaluate.load_checkpoint(path)
    for flag in settings:
        if flag in ("model", "val_subset") or found.get(flag) == settings[flag]:
            continue
        if flag not in found:
            raise UserError(f"{out} was made by an earlier version: it can be judged, not continued; train "
                            f"anew: {again(args)}")
        if flag == "epochs" and checkpoint["epoch"] == found["epochs"]:
            raise UserError(f"{out} is finished: over its {found['epochs']} epochs the learning rate has come "
                            f"down to 0, so it cannot go on; train anew: {again(args)}")
        raise UserError(f"{out} holds a run with --{flag.replace('_', '-')} {found[flag]}, not "
                        f"{settings[flag]}: repeat its flags to go on with it, or train beside it: "
                        f"{again(args)}")
    return checkpoint


def again(args, *changes):
    """The command of this training, changed, into a run folder that is not there yet."""
    number = next(n for n in itertools.count(2) if not Path(f"{args.out.rstrip('/')}-{n}").exists())
    flags = [*args.argv, *changes, "--out", f"{args.out.rstrip('/')}-{number}"]  # the last one counts
    return f"python train.py {shlex.join(map(str, flags))}"


def next_step(out):
    return f"next: python evaluate.py {shlex.quote(str(out))}"


def prepare(settings, args, device):
    """Make the demo where it is asked for and missing, and its backbone."""
    root, weights = Path(settings["data"]), Path(settings["weights"])
    if args.data == "demo" and not root.exists():
        print("data       rendering the demo world into demo/", flush=True)
        data.make_demo(root)
    if weights == demo_backbone(root) and not weights.is_file():
        pretrain(weights, settings["backbone"], device)


def demo_backbone(root):
    return Path(root) / "backbone.pt"


def pretrain(path, backbone, device):
    """Pretrain the demo's backbone on one task alone: which classes are in an image. Writes `path`."""
    number, held_out, epochs, batch, peak = 4000, 400, 9, 16, 1e-3
    side = ase.BACKBONES[backbone]["image"]
    print(f"backbone   pretraining {backbone} on {number} images of their own", flush=True)
    # seeds that no scene of the demo has
    seeds = range(10 ** 9, 10 ** 9 + number + held_out)
    scenes = list(data.parallel(data.scene_classes, [(seed, side) for seed in seeds], "render"))
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in scenes])  # (n, 3, S, S)
    present = torch.stack([torch.from_numpy(classes) for _, classes in scenes]).float()      # (n, 20)
    torch.manual_seed(0)
    classes = present.shape[1]
    model = ase.ASE(ase.Config(**ase.BACKBONES[backbone], experts=0, tasks={"classes": classes})).to(device)
    classify = torch.nn.Linear(model.config.dim, classes).to(device)
    # The patch embedding stays random, as in MoCo v3 (Chen et al. 2021): F1 72% instead of 64%, and a patch
    # keeps its detail for the other tasks. The strong decay keeps tokens small: adapters can move them.
    model.patch_embed.requires_grad_(False)
    vit = [p for name, p in model.named_parameters() if ase.part(name) == "backbone"]
    parameters = [p for p in (*vit, *classify.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.3)
    steps = number // batch

    def logits(x):
        x = data.normalise(x.to(device).float(), "imagenet")
        return classify(model.features(x)[0][0].mean(1))

    for step in data.progress(range(steps * epochs), steps * epochs, "pretrain"):
        if step % steps == 0:
            order = torch.randperm(number)
        indices = order[step % steps * batch:][:batch]
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps * epochs, peak)
        mirrored = (torch.rand(batch) < 0.5).view(-1, 1, 1, 1)
        x = torch.where(mirrored, images[indices].flip(3), images[indices])
        loss = F.binary_cross_entropy_with_logits(logits(x), present[indices].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        rest = torch.arange(number, number + held_out)
        found = torch.cat([logits(images[i]) for i in rest.split(batch)]).cpu() > 0
    truth = present[rest] > 0
    occurring = truth.any(0)
    right = (found == truth)[:, occurring].float().mean().item()
    both, either = (found & truth).sum(0)[occurring], (found.sum(0) + truth.sum(0))[occurring]
    f1 = (2 * both / either.clamp(min=1)).mean().item()
    told = {"accuracy": right, "f1": f1, "images": number, "epochs": epochs}
    print(f"backbone   pretrained on which of {int(occurring.sum())} classes are in an image: "
          f"accuracy {right:.1%}, mean F1 {f1:.1%} on {held_out} held out; kept as {path}")
    data.write_json(path.with_suffix(".json"), told)
    state = {name: p for name, p in model.state_dict().items() if ase.part(name) == "backbone"}
    data.write_atomically(path, lambda file: torch.save(state, file))


def resolve(args):
    """All that decides the trained weights, from flags and the data's defaults; flags and files checked."""
    root = Path(args.data)
    to_make = args.data == "demo" and not root.exists()
    is_demo = to_make or (root / "demo.json").is_file()
    images = data.DEMO["train"]
    if not to_make:
        ids = [data.read_ids(root, split) for split in ("train", "val")]
        images, both = len(ids[0]), sorted(set(ids[0]).intersection(ids[1]))
        if both:
            raise UserError(f"{both[0]} is in both train.txt and val.txt of {root} ({len(both)} such ids): "
                            "remove it from one")
    defaults = DEFAULTS["demo" if is_demo else "pascal"]
    settings = {"data": str(root.resolve()), "val_subset": defaults["val_subset"]}
    for flag in ("epochs", "batch", "lr"):
        settings[flag] = getattr(args, flag) or defaults[flag]
    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    for task in tasks:
        if task not in TASKS or tasks.count(task) > 1:
            raise UserError(f"--tasks {args.tasks}: {task!r} is unknown or named twice; expected some of "
                            f"{','.join(TASKS)}")
    try:
        backbone = args.backbone
        args.pretrained = ase.read_backbone(args.weights) if args.weights not in (None, "none") else None
        if backbone is None and args.pretrained:
            backbone = ase.backbone_for(args.pretrained)
        backbone = backbone or defaults["backbone"]
        if backbone not in ase.BACKBONES:
            raise UserError(f"unknown backbone {backbone!r}: expected one of {', '.join(ase.BACKBONES)}")
        fields = dict(ase.BACKBONES[backbone])
        fields["tasks"] = {name: task.channels for name, task in TASKS.items() if name in tasks}
        if args.size:
            fields["image"] = args.size
        names = ("experts", "topk", "shared", "rank", "gating", "noise", "lora")
        config = ase.Config(**fields, **{name: getattr(args, name) for name in names})
        weights = args.weights
        if weights is None and is_demo and backbone == defaults["backbone"]:
            weights = str(demo_backbone(root))
        if weights is None:
            raise UserError(f"no weights for {backbone}: a frozen random backbone is no experiment; name "
                            "pretrained ones, "
                            "--weights FILE (README tells where from), or mean it: --weights none")
        if args.weights is None and Path(weights).is_file():
            args.pretrained = ase.read_backbone(weights)
        if args.pretrained:
            with torch.device("meta"):  # nothing but shapes: a check of the file
                model = ase.ASE(config)
            ase.load_backbone(model, args.pretrained)
    except ValueError as error:
        raise UserError(str(error)) from None
    if settings["batch"] > images:
        raise UserError(f"--batch {settings['batch']} is larger than the {images} training images: lower it")
    settings.update({name: getattr(config, name) for name in names}, size=config.image, backbone=backbone,
                    tasks=",".join(config.tasks),
                    weights=weights if weights == "none" else str(Path(weights).resolve()), mean_std=args.mean_std, mi=args.mi,
                    seed=args.seed, model=asdict(config))
    return settings


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
    demo, pascal = DEFAULTS["demo"], DEFAULTS["pascal"]
    count, some = number(int, 0), number(int, 1)
    parser = argparse.ArgumentParser(description=__doc__)

    def flag(name, kind, metavar, told, default=None):
        told += "" if default is None else f" (default {default})"
        group.add_argument(name, type=kind, metavar=metavar, default=default, help=told)

    def both(flag):
        return f"(default {demo[flag]} on a demo, {pascal[flag]} elsewhere)"

    group = parser.add_argument_group("the model")
    flag("--experts", count, "N", "experts in a layer, shared ones included; 0: no experts at all", 16)
    flag("--topk", count, "K", "sparse experts active for a token, shared ones not included", 3)
    flag("--shared", count, "S", "shared experts", 1)
    flag("--rank", count, "R", "rank of an expert", 4)
    flag("--gating", str, "|".join(ase.GATINGS), "joint: one softmax over selected and shared experts, ASE; "
         "fixed: softmax before top-k, shared gates are 1", "joint")
    flag("--lora", count, "R", "rank of the LoRA on the backbone; 0 trains it in full (default 4, or 0 "
         "without experts)")
    flag("--noise", number(float, 0), "X", "factor of the routers' learned noise in training, as in Mod-Squad; "
         "0: none", 1.0)
    flag("--mi", number(float, 0), "W", "weight of the mutual information loss, as in Mod-Squad", 0.005)
    flag("--tasks", str, "A,B", f"some of {','.join(TASKS)} (default all)")
    flag("--backbone", str, "NAME",
         f"{', '.join(ase.BACKBONES)} {both('backbone')}; given --weights decide it")
    flag("--weights", str, "FILE", "pretrained ViT, .safetensors or torch.save; none: random "
         "(default: a demo's own backbone; needed elsewhere)")
    group.add_argument("--mean-std", default="imagenet", choices=data.MEAN_STD,
                       help="what the weights' images were normalised with: imagenet (DeiT, "
                            "MAE, DINO) or half (timm's augreg, Google's) (default imagenet)")
    group = parser.add_argument_group("the data")
    flag("--data", str, "DIR", "a folder in PASCAL-Context's layout; demo is made if it isn't there", "demo")
    flag("--cache", str, "DIR", "where parsed images are kept (default: cache/ in the data's folder)")
    flag("--size", some, "PIXELS", "side of the network's square input (default: the backbone's, 112 or 224)")
    flag("--workers", number(int, 0, 256), "N", "processes that read ahead (default 4 for a GPU; a CPU needs none: 0)")
    group = parser.add_argument_group("the training (the paper says no more than: 40 epochs)")
    flag("--out", str, "DIR", "the run folder", "run")
    flag("--epochs", some, "N", f"passes over the images {both('epochs')}")
    flag("--batch", some, "N", f"images a step, on all devices {both('batch')}")
    flag("--micro-batch", some, "N", "images at a time on one device; gradients add up to the batch's, "
         "router noise and mutual information are each part's own (default: all)")
    flag("--lr", number(float, 1e-9), "X", f"highest learning rate {both('lr')}")
    flag("--seed", number(int, 0, 1_000_000_000), "N", "of everything random", 0)
    flag("--device", str, "NAME", "cpu, cuda, … (default: cuda where there is one)")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--checkpointing", action="store_true",
                       help="recompute each block in the backward pass: less memory, same gradients")
    parser.set_defaults(argv=sys.argv[1:] if argv is None else argv)
    return data.command(parser, run, argv)


def run(args):
    """Check everything, then train."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = data.pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    settings = resolve(args)
    if settings["batch"] % world:
        raise UserError(f"--batch {settings['batch']} does not divide "
                        f"among {world} processes: choose a multiple")
    if world > 1:
        gpu = device if device.type == "cuda" else None
        if gpu:
            torch.cuda.set_device(gpu)
        # process 0 may render, pretrain and fill a cache while the others wait
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(hours=6))
    torch.backends.cudnn.benchmark = True  # all batches have one size
    try:
        with locked(Path(args.out)) if rank == 0 else contextlib.nullcontext():
            train(settings, args, rank, world, device)
    except RuntimeError as error:
        if world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise UserError(f"process {rank} has lost the others: the line of the one that stopped first "
                            "tells why") from None
        raise
    if world > 1:  # not after an error: that would wait for the others
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
