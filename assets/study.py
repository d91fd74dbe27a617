"""The study behind README's results: what its runs say, and how a run becomes a line of it.

    python -m assets.study                       every figure of study.md
    python -m assets.study --add RUN… [--on DIR] append judged runs to study.jsonl, or what they reach on DIR

A line holds a run's settings, metrics, losses and gates by epoch, and what is measured here: cosines of
tasks' gradients, scale of updates, shared experts' gates on patches with and without an edge, or an object.
"""

import argparse
import collections
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

import ase
import data
import evaluate
from data import TASKS

STUDY = Path(__file__).parent / "study.jsonl"
METHODS = {("fixed", False): "vanilla", ("joint", False): "control",  # gating, whether experts are shared
           ("fixed", True): "naive", ("joint", True): "ASE"}
SIZES = (16, 32, 64)  # N, with k + S = N / 4 and a rank of 64 / N
MEAN = dict.fromkeys(METHODS.values(), 0.25)
EFFECTS = {"gates that sum to 1": {"ASE": 0.5, "control": 0.5, "naive": -0.5, "vanilla": -0.5},
           "shared experts": {"ASE": 0.5, "naive": 0.5, "control": -0.5, "vanilla": -0.5}}
EFFECTS |= {f"{a} - {b}": {a: 1, b: -1} for a, b in (
    ("ASE", "vanilla"), ("naive", "vanilla"), ("ASE", "naive"), ("control", "vanilla"), ("ASE", "control"))}
WITHOUT = {flag: {f"ASE, {flag}": 0.5, f"vanilla, {flag}": 0.5, "ASE": -0.5, "vanilla": -0.5}
           for flag in ("mi 0", "noise 0", "late task")}  # less with the default
COMPARISONS = {name: (weights, "Δm") for name, weights in EFFECTS.items()}  # weights of rows, number
COMPARISONS |= {f"{of} - MTL-ViT's": (MEAN | {"MTL-ViT": -1}, of) for of in (*TASKS, "Δm")}
COMPARISONS |= {
    "N = 64 - 16": ({(row, n): w for row in MEAN for n, w in ((64, 0.25), (16, -0.25))}, "Δm"),
    "k = 4 to 7 - 3": ({f"ASE, k = {k}": 0.25 for k in range(4, 8)} | {"ASE": -1}, "Δm"),
    "shared gates, epoch 1 - 25%": ({"ASE": 1}, "lead"), "shared gates, last - first": ({"ASE": 1}, "change"),
    "shared gate / mean sparse gate, epoch 1": ({"ASE": 1}, "ratio"),
    "LoRA's cosine, ASE - vanilla": (EFFECTS["ASE - vanilla"], "LoRA")}
BESIDE = {  # lines below the claims
    "scale: experts' update / FFN's output, naive - ASE": ({"naive": 1, "ASE": -1}, "scale"),
    "conflict on experts: sparse ones' cosine, ASE - vanilla": (EFFECTS["ASE - vanilla"], "sparse experts"),
    "conflict on experts: shared ones' cosine, ASE - naive": (EFFECTS["ASE - naive"], "shared experts"),
    "mutual information: Δm without it": (WITHOUT["mi 0"], "Δm"),
    "router noise: Δm without it": (WITHOUT["noise 0"], "Δm")}
COMPARISONS |= BESIDE | {f"gates, {kind} - elsewhere, {task}": ({"ASE": 1}, f"{kind} for {task}")
                         for kind in ("edge", "object") for task in TASKS}
COMPARISONS |= {f"late task - joint, {task}": (WITHOUT["late task"], task) for task in TASKS}
CLAIMS = (  # claim, the paper's answer, comparisons and their sides
    ("ASE > vanilla", "+1.4, +1.5", {"ASE - vanilla": 1}),
    ("naive < vanilla", "yes", {"naive - vanilla": -1}),
    ("sum-to-1 gates help", "untested", {"gates that sum to 1": 1}),
    ("shared experts help", "untested", {"shared experts": 1}, 0.5),  # no, too, if within ±0.5
    ("experts > MTL-ViT", "yes",
     {"semseg - MTL-ViT's": 1, "sal - MTL-ViT's": 1, "edge - MTL-ViT's": 1, "normals - MTL-ViT's": -1}),
    ("finer; more experts", "+0.1; yes", {"N = 64 - 16": 1, "k = 4 to 7 - 3": 1}),
    ("shared lead; yield", "yes; yes", {"shared gates, epoch 1 - 25%": 1, "shared gates, last - first": -1}),
    ("less conflict", "yes", {"LoRA's cosine, ASE - vanilla": 1}))
FOOTNOTE = """Points of Δm; row 5: semseg, sal, edge, normals' error; 7: % of the gates; 8: LoRA's cosine.
±: half of a 95% t interval over blocks, uncorrected; images and world are fixed. In brackets the new runs,
which alone decide if two blocks or more: yes (no), if the interval is on the claim's (other) side of 0; else
open. Planned: rows 1, 3 (primary), 4 (also no within ±0.5), 5, where, variance; the others are exploratory.
"""


# -------------------------------------------------------------------------------------- from a run to a line


def conflict(model, run, dataset):
    """{part: [share of pairs of tasks whose gradients oppose, mean cosine]}, on 16 images, in eval mode."""
    names, common = zip(*((name, p) for name, p in model.named_parameters()
                          if ase.part(name) in ("LoRA", "experts")))
    canvas = map(torch.from_numpy, dataset.canvas(range(min(16, len(dataset)))))
    batch = data.warp(*canvas, model.config.image, run.settings["mean_std"], model.config.tasks)
    losses = evaluate.losses(model(batch.images)[0], batch.targets)
    gradients = [torch.autograd.grad(loss, common, retain_graph=True) for loss in losses.values()]
    shared, found = model.config.shared, {}
    for part, kind, cut in (("LoRA", "LoRA", slice(None)), ("shared experts", "experts", slice(shared)),
                            ("sparse experts", "experts", slice(shared, None))):
        vectors = torch.stack([torch.cat([g[cut].flatten() for name, g in zip(names, of_task)
                                          if ase.part(name) == kind]) for of_task in gradients])
        if vectors.numel():
            x = F.normalize(vectors.double(), dim=1)                                     # (T, parameters)
            pairs = (x @ x.T)[tuple(torch.triu_indices(len(x), len(x), 1))]
            found[part] = [(pairs < 0).double().mean().item(), pairs.mean().item()]
    return found


@torch.inference_mode()
def scale(model, run, dataset):
    """Root mean square of the experts' update over that of the FFN's output, mean over layers and tasks."""
    squares = collections.defaultdict(float)

    def keep(module):
        def hook(module, x, y):
            y = y[0] if isinstance(y, tuple) else y
            squares[module] = squares[module] + y.double().square().mean((1, 2, 3))      # (T,)
        module.register_forward_hook(hook)
        return module

    pairs = [(keep(block.experts), keep(block.mlp)) for block in model.blocks if block.experts is not None]
    for i in range(0, len(dataset), -(-len(dataset) // 50)):
        model(evaluate.to_input(model, dataset[i][0].numpy(), run.settings["mean_std"], "cpu"))
    return torch.stack([(squares[update] / squares[ffn]).sqrt() for update, ffn in pairs]).mean().item()


@torch.inference_mode()
def where(model, run, dataset):
    """{"edge": gates, "object": gates}: of the shared experts, summed, by layer and task, mean over patches
    with a pixel of it and without, lists (layers, T, 2)."""
    c = model.config
    canvas = map(torch.from_numpy, dataset.canvas(range(len(dataset))))
    batch = data.warp(*canvas, c.image, run.settings["mean_std"], c.tasks)
    mass = evaluate.gates_of(model, batch.images)[..., :c.shared].sum(-1).flatten(2)     # (layers, T, B·P)
    classes, edges, found = batch.targets["semseg"], batch.targets["edge"], {}           # (B, S, S)
    for name, pixels in {"edge": edges == 1, "object": (classes > 0) & (classes != data.IGNORE)}.items():
        there = F.max_pool2d(pixels.float(), c.patch).flatten() > 0                      # (B·P,)
        means = torch.stack([mass[..., there].mean(-1), mass[..., ~there].mean(-1)], -1)
        found[name] = np.round(means.double().numpy(), 5).tolist()
    return found


def line_of(folder, other=None):
    """A run as a line of the study, or what it reaches on another data set. UserError: it is not finished."""
    run = evaluate.open_run(folder)
    if evaluate.load_checkpoint(folder)["epoch"] < run.settings["epochs"]:
        raise data.UserError(f"{folder} is not finished")
    model = evaluate.load_model(run, torch.device("cpu"))
    line = {"run": run.folder.name, "settings": dict(run.settings)}
    for place in ("data", "weights", "extend"):
        line["settings"][place] = Path(run.settings[place] or "").name
    if other:
        dataset = data.PascalContext(other, "val", run.config.image, run.config.tasks)
        counts, _ = evaluate.accumulate(model, dataset, run.settings["mean_std"], torch.device("cpu"))
        return line | {"on": Path(other).name, "images": len(dataset), "metrics": evaluate.metrics_of(counts)}
    path = run.folder / "metrics.json"
    with data.reading(path, f"python evaluate.py {folder} makes it"):
        result = json.loads(path.read_bytes())
    train_set, val_set = (data.PascalContext(run.settings["data"], split, run.config.image, run.config.tasks)
                          for split in ("train", "val"))
    records = [record for record in evaluate.read_log(run.folder) if record["kind"] == "epoch"]
    line |= {"metrics": result["metrics"], "val": [record["val"] for record in records]}
    if run.config.experts and run.config.shared and {"semseg", "edge"} <= run.config.tasks.keys():
        line["where"] = where(model, run, val_set)
    if run.config.experts:
        line |= {"gates": np.round([record["gates"] for record in records], 5).tolist(),
                 "conflict": conflict(model, run, train_set), "scale": scale(model, run, val_set)}
    return line


# ------------------------------------------------------------------------------------- what the lines say


def row_of(line):
    """(name, N) of a line's row: a method, "MTL-ViT" or "alone", and what differs from the default."""
    s, c = line["settings"], ase.Config(**line["settings"]["model"])
    if not c.experts:
        return "MTL-ViT" if len(c.tasks) > 1 else "alone", 0
    name = METHODS[c.gating, c.shared > 0]
    name += f", k = {c.topk}" * (c.topk + c.shared != c.experts // 4)
    name += ", mi 0" * (s["mi"] == 0) + ", noise 0" * (s["noise"] == 0) + ", late task" * bool(s["extend"])
    return name + f", on {line.get('on')}" * ("on" in line), c.experts


def read_lines(path=STUDY):
    """{(row, N): {seed: {name: number}}}: metrics, Δm, cosines, scale; of the shared experts' gates: lead,
    after epoch 1 over an equal part, S / (S + k) = 25%; change, from then to the end; ratio to a mean sparse
    gate; what is more on patches with an edge or an object. Late tasks of a seed are one run."""
    rows = collections.defaultdict(dict)
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        s = line["settings"]
        run = rows[row_of(line)].setdefault(s["seed"], {})
        metrics = (line if "metrics" in line else line["result"])["metrics"]
        if run.keys() & metrics:
            raise data.UserError(f"{path}: {line['run']} is there twice, or another run of its row and seed")
        run |= metrics
        old = line.get("epochs", [{}])  # of the first 146 lines
        share = [epoch.get("shared_mass") for epoch in old]
        line = old[-1] | line
        if "gates" in line:  # (epochs, layers, T, N)
            share = np.array(line["gates"])[..., :s["shared"]].sum(-1).mean((1, 2))
        if line.get("scale"):
            run |= {"lead": 100 * share[0] - 25, "change": 100 * (share[-1] - share[0])}
            if 0 < share[0] < 1:
                run["ratio"] = share[0] / (1 - share[0]) * (s["experts"] / s["shared"] - 1)
            run |= {part: mean for part, (_, mean) in line["conflict"].items()} | {"scale": line["scale"]}
        for kind, gates in line.get("where", {}).items():
            there, elsewhere = 100 * np.moveaxis(np.array(gates).mean(0), -1, 0)  # (T,)
            run |= {f"{kind} for {task}": more for task, more in zip(TASKS, there - elsewhere)}
    for run in itertools.chain(*(found.values() for found in rows.values())):
        run["Δm"] = evaluate.delta_m({task: run[task] for task in TASKS}, evaluate.BASELINES["demo"])
    return rows


def differences(rows, weights, number="Δm", new=False):
    """{(N, seed): Σ weight × number}, the blocks with all these rows; new: of the second series."""
    found = {}
    for n in SIZES:
        members = [rows.get((row, n)) or rows.get((row, 0)) or rows.get(row, {}) for row in weights]
        for seed in range((8 if n == 32 else 4) if new else 0, 16):
            numbers = [runs[seed][number] for runs in members if number in runs.get(seed, ())]
            if len(numbers) == len(weights):
                found[n, seed] = np.dot(numbers, [*weights.values()])
    return found


def by_seed(blocks):
    """{(None, seed): mean of its blocks}, which share their order of images."""
    return {(None, seed): np.mean([value for (_, other), value in blocks.items() if other == seed])
            for seed in sorted({seed for _, seed in blocks})}


def compare(rows, name, new=False):
    """The blocks of a comparison; where it has rows of several N, a seed is a block."""
    weights, number = COMPARISONS[name]
    blocks = differences(rows, weights, number, new)
    return by_seed(blocks) if {"MTL-ViT", ("ASE", 64)} & {*weights} else blocks


def interval(values):
    """(mean, half of its 95% t interval, number) of a dictionary's values."""
    x = np.array([*values.values()])
    if len(x) < 2:
        return np.nan, np.nan, len(x)
    return x.mean(), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x), len(x)


def verdict(values, side=1, margin=0):
    """yes: the whole interval is on the claim's side of 0; no: on the other, or within ±margin; else open."""
    mean, half, _ = interval(values)
    no = -side * mean > half or abs(mean) + half < margin
    return "yes" if side * mean > half else "no" if no else "open"


def joint(rows, weights, new=False):
    """(p of an effect on the five metrics together, the least that so many seeds can give): the share of all
    sign flips of seeds whose sum of squared t values, of the means of seeds, is as large as the true one."""
    x = np.array([[*by_seed(differences(rows, weights, task, new)).values()] for task in TASKS]).T
    flips = np.array([*itertools.product((1, -1), repeat=len(x))])                       # (2^seeds, seeds)
    means = flips @ x / len(x)
    found = (means ** 2 / ((x ** 2).mean(0) - means ** 2)).sum(1)  # t² / (seeds − 1)
    return (found >= found[0] * (1 - 1e-9)).mean(), 2 / len(flips)


def variance(rows, method, new):
    """(variance of Δm between seeds, pooled over N, its degrees of freedom)."""
    found = differences(rows, {method: 1}, "Δm", new)
    away = [value - np.mean([other for (m, _), other in found.items() if m == n])
            for (n, _), value in found.items()]
    free = len(found) - len({n for n, _ in found})
    return np.dot(away, away) / free if free else np.nan, free


def table(head, *rows):
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, ["-" * width for width in widths], *rows):
        print(" | ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    print()


def told(rows, name, n=None):
    """A comparison over all runs, and in brackets over the new ones; or over all of one N."""
    texts, number = [], COMPARISONS[name][1]
    digits = dict(lead=1, change=1, LoRA=3, scale=3).get(number, 3 if "experts" in number else 2)
    for new, form in ((False, "{}"), (True, "({})"))[:1 if n else 2]:
        blocks = {block: value for block, value in compare(rows, name, new).items() if n in (None, block[0])}
        mean, half, count = interval(blocks)
        texts += [form.format(f"{mean:+.{digits}f} ±{half:.{digits}f}")] * (count > 1)
    return " ".join(texts) or "–"


def claim(rows, title, paper, sides, margin=0):
    """A row of the claims. The new runs decide; where they have fewer than two blocks, all do."""
    found = [(compare(rows, name), compare(rows, name, True), side) for name, side in sides.items()]
    verdicts = [verdict(new if len(new) > 1 else every, side, margin) for every, new, side in found]
    verdicts = ["a trade"] if verdicts == ["yes", "no", "no", "no"] else verdicts
    counts = dict.fromkeys(f"{len(every)}" + f" ({len(new)})" * (len(new) > 0) for every, new, _ in found)
    here = [told(rows, name).split(" (")[0] if len(sides) > 2 else told(rows, name) for name in sides]
    return title, paper, "; ".join(here), "; ".join(counts), "; ".join(verdicts)


def report(rows):
    table(("claim", "paper", "here, all runs (new runs)", "blocks", "verdict"),
          *(claim(rows, *row) for row in CLAIMS))
    print(*(f"- {name}: {told(rows, name)}" for name in BESIDE), sep="\n")
    found = [verdict(compare(rows, name, True)) for name in COMPARISONS if name.startswith("gates, ")]
    print(f"- where shared experts work: larger on edges, objects (5 tasks) in {found.count('yes')} of 10 "
          f"intervals, smaller in {found.count('no')}: {'yes' if {*found} == {'yes'} else 'open'}")
    for name in ("gates that sum to 1", "shared experts"):
        (every, _), (new, least) = (joint(rows, EFFECTS[name], new) for new in (False, True))
        print(f"- {name}, five metrics jointly: p {every:.3f} ({new:.3f}; smallest possible {least:.3f})")
    for new, label in ((False, "all"), (True, "new")):
        whole, pair = (compare(rows, name, new) for name in ("gates that sum to 1", "ASE - vanilla"))
        a, b = (stats.sem([*x.values()]) * stats.t.ppf([0.975, 0.8], len(x) - 1).sum() for x in (whole, pair))
        (v, free_v), (w, free_w) = (variance(rows, method, new) for method in ("vanilla", "ASE"))
        print(f"- {label} runs, {len(pair)} blocks, {len(by_seed(pair))} seeds: 80% power: {a:.1f} (row 3), "
              f"{b:.1f} (row 1); variance: vanilla {v:.2f}, ASE {w:.2f}, "
              f"p {stats.f.sf(v / w, free_v, free_w):.2f}")
    print("\n" + FOOTNOTE)
    mean = {row: interval(differences(rows, dict.fromkeys(MEAN, 0) | {row: 1}))[0] for row in MEAN}
    table(("", "gates fixed", "gates that sum to 1", "effect"), *(
        (name, f"{a} {mean[a]:+.2f}", f"{b} {mean[b]:+.2f}", told(rows, f"{b} - {a}"))
        for name, a, b in (("no shared experts", "vanilla", "control"), ("shared experts", "naive", "ASE"))))
    table(("mean ± standard deviation", "N", "runs", *TASKS, "Δm"), *(
        (row, str(n or "–"), str(len(runs)), *(evaluate.cell([run[name] for run in runs.values()], ".2f")
                                               for name in (*TASKS, "Δm")))
        for (row, n), runs in sorted(rows.items(), key=lambda row: row[0][::-1])))
    table(("difference", *(f"N = {n}" for n in SIZES), "all runs (new runs)"),
          *((name, *(told(rows, name, n) for n in SIZES), told(rows, name)) for name in COMPARISONS))
    shares = np.mean([[epoch["shared_mass"] for epoch in json.loads(line)["epochs"]]
                      for line in (STUDY.parent / "early.jsonl").read_text().splitlines()], 0)
    print("- shared experts' part of the gates on 120 images, every 60 steps: " + ", ".join(
        f"{100 * shares[i]:.1f}% after {60 * (i + 1):,}" for i in (0, 1, 4, 9, 29)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", nargs="+", metavar="RUN", help="append these runs to assets/study.jsonl")
    parser.add_argument("--on", metavar="DIR", help="judged on this data set, too")
    return data.command(parser, run, argv)


def run(args):
    for folder in args.add or ():
        with open(STUDY, "a", encoding="utf-8") as file:
            file.write(json.dumps(line_of(folder, args.on)) + "\n")
        print(f"added {folder}", flush=True)
    if not args.add:
        report(read_lines())


if __name__ == "__main__":
    sys.exit(main())
