"""The study behind README's results: what its runs say, and how a run becomes a line of it.

    python -m assets.study                 effects by the plan of study.md, and a table of all rows
    python -m assets.study --add RUN…      append finished runs to assets/study.jsonl

A line holds a run's settings, metrics, validation losses and gates by epoch, and what is measured here on its
model: the cosines of the tasks' gradients, the scale of the experts' updates, and the gates of the shared
experts on patches with and without an edge, and an object. The first 146 lines, which are older, hold less.
"""

import argparse
import collections
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import ase
import data
import evaluate
from data import TASKS

STUDY = Path(__file__).parent / "study.jsonl"
CONFLICT = 16  # training images whose gradients are compared
METHODS = {("fixed", False): "vanilla", ("joint", False): "control",  # gating, whether experts are shared
           ("fixed", True): "naive", ("joint", True): "ASE"}


# -------------------------------------------------------------------------------------- from a run to a line


def conflict(model, run, dataset):
    """{part: [share of pairs of tasks whose gradients oppose, mean cosine]}, gradients of single losses.

    On the first images of the training set, unchanged, in eval mode. Parts: LoRA, shared and sparse experts.
    The T × T products are summed in float64, parameter by parameter.
    """
    common = [(name, p) for name, p in model.named_parameters() if ase.part(name) in ("LoRA", "experts")]
    canvas = map(torch.from_numpy, dataset.canvas(range(min(CONFLICT, len(dataset)))))
    batch = data.warp(*canvas, model.config.image, run.settings["mean_std"], model.config.tasks)
    losses = evaluate.losses(model(batch.images)[0], batch.targets)
    gradients = [torch.autograd.grad(loss, [p for _, p in common], retain_graph=True)
                 for loss in losses.values()]
    products = collections.defaultdict(float)
    for (name, _), *columns in zip(common, *gradients):
        g, cut = torch.stack(columns).double(), model.config.shared                      # (T, …)
        pieces = {"LoRA": g}
        if ase.part(name) == "experts":
            pieces = {"shared experts": g[:, :cut], "sparse experts": g[:, cut:]}
        for piece, x in pieces.items():
            products[piece] = products[piece] + x.flatten(1) @ x.flatten(1).T
    found = {}
    for piece, product in products.items():
        if product.diagonal().gt(0).sum() > 1:  # a task without ground truth has no gradient
            known = product.diagonal() > 0
            norm = product.diagonal()[known].sqrt()
            cosine = product[known][:, known] / norm / norm[:, None]
            pairs = cosine[tuple(torch.triu_indices(len(norm), len(norm), 1))]
            found[piece] = [(pairs < 0).double().mean().item(), pairs.mean().item()]
    return found


@torch.inference_mode()
def scale(model, run, dataset):
    """Root mean square of the experts' update over that of the FFN's output, mean over layers and tasks."""
    squares = collections.defaultdict(float)

    def keep(layer, kind):
        def hook(module, x, y):
            y = y[0] if kind == "update" else y
            squares[layer, kind] = squares[layer, kind] + y.double().square().mean((1, 2, 3))  # (T,)
        return hook

    blocks = [(i, block) for i, block in enumerate(model.blocks) if block.experts is not None]
    hooks = [block.experts.register_forward_hook(keep(i, "update")) for i, block in blocks]
    hooks += [block.mlp.register_forward_hook(keep(i, "ffn")) for i, block in blocks]
    for i in range(0, len(dataset), -(-len(dataset) // 50)):
        model(evaluate.to_input(model, dataset[i][0].numpy(), run.settings["mean_std"], "cpu"))
    for hook in hooks:
        hook.remove()
    return torch.stack([(squares[i, "update"] / squares[i, "ffn"]).sqrt() for i, _ in blocks]).mean().item()


@torch.inference_mode()
def where(model, run, dataset):
    """{"edge": gates, "object": gates}: of the shared experts, summed, by layer and task, mean over patches
    with a pixel of it and without, lists (layers, T, 2)."""
    c = model.config
    totals, counts = collections.defaultdict(float), collections.defaultdict(float)
    for i in range(len(dataset)):
        canvas = map(torch.from_numpy, dataset.canvas([i]))
        batch = data.warp(*canvas, c.image, run.settings["mean_std"], c.tasks)
        gates = evaluate.gates_of(model, batch.images)[:, :, 0]                          # (layers, T, P, N)
        mass = gates[..., :c.shared].sum(-1).double()                                    # (layers, T, P)
        classes, edges = batch.targets["semseg"][0], batch.targets["edge"][0]
        for name, pixels in {"edge": edges == 1, "object": (classes > 0) & (classes != data.IGNORE)}.items():
            side = c.image // c.patch
            there = pixels.view(side, c.patch, side, c.patch).any(3).any(1).flatten()    # (P,)
            totals[name] = totals[name] + torch.stack([mass @ there.double(), mass @ (~there).double()], -1)
            counts[name] = counts[name] + torch.stack([there.sum(), (~there).sum()])
    return {name: short((totals[name] / counts[name]).numpy()) for name in totals}


def short(x):
    """Nested lists of numbers to five decimals: a line is kept for good."""
    return np.round(x, 5).tolist()


def line_of(folder):
    """A finished run as a line of the study. Raises UserError where it is not finished, or not judged."""
    run = evaluate.open_run(folder)
    if evaluate.load_checkpoint(folder)["epoch"] < run.settings["epochs"]:
        raise data.UserError(f"{folder} is not finished")
    path = run.folder / "metrics.json"
    with data.reading(path, f"python evaluate.py {folder} makes it"):
        result = json.loads(path.read_bytes())
    model = evaluate.load_model(run, torch.device("cpu"))
    train_set, val_set = (data.PascalContext(run.settings["data"], split, run.config.image, run.config.tasks)
                          for split in ("train", "val"))
    records = [record for record in evaluate.read_log(run.folder) if record["kind"] == "epoch"]
    line = {"run": run.folder.name, "settings": run.settings, "metrics": result["metrics"],
            "val": [record["val"] for record in records],
            "gates": short([record["gates"] for record in records]),
            "information": short([record["mutual_information"] for record in records])}
    for place in ("data", "weights", "extend"):
        line["settings"][place] = Path(run.settings[place] or "").name
    if run.config.experts:
        line |= {"conflict": conflict(model, run, train_set), "scale": scale(model, run, val_set)}
    if run.config.experts and run.config.shared and {"semseg", "edge"} <= run.config.tasks.keys():
        line["where"] = where(model, run, val_set)
    return line


# ------------------------------------------------------------------------------------- what the lines say


def read_lines(path=STUDY):
    """{(method, N): {seed: (line, Δm)}} of runs of all five tasks with the default settings, with as many
    active experts in each method: a name in METHODS, or "MTL-ViT"."""
    rows = collections.defaultdict(dict)
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        line["metrics"] = line["metrics"] if "metrics" in line else line["result"]["metrics"]
        s, c = line["settings"], ase.Config(**line["settings"]["model"])
        active = {16: 4, 32: 8, 64: 16}.get(c.experts)
        if len(c.tasks) < len(TASKS) or s["extend"] or s["mi"] != 0.005 or s["noise"] != 1:
            continue
        if c.experts and c.topk + c.shared != active or c.experts == 16 and c.shared > 1:
            continue
        method = METHODS[c.gating, c.shared > 0] if c.experts else "MTL-ViT"
        gain = evaluate.delta_m(line["metrics"], evaluate.BASELINES["demo"])
        rows[method, c.experts][s["seed"]] = line, gain
    return rows


def effect(rows, weights, new=None):
    """(mean, half of its 95% t interval, blocks) of Σ weight × Δm over blocks (N, seed) with these methods.

    new: only blocks of the second series (True), of the first (False), or all (None).
    """
    values = []
    for n in (16, 32, 64):
        for seed in sorted(set.intersection(*({*rows[method, n]} for method in weights))):
            if new is None or new == (seed >= (8 if n == 32 else 4)):
                values.append(sum(w * rows[method, n][seed][1] for method, w in weights.items()))
    if len(values) < 2:
        return np.nan, np.nan, len(values)
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values), half, len(values)


EFFECTS = {
    "(a) gates that sum to 1": dict(ASE=0.5, control=0.5, naive=-0.5, vanilla=-0.5),
    "(b) shared experts": dict(ASE=0.5, naive=0.5, control=-0.5, vanilla=-0.5),
    "(c) ASE - vanilla": dict(ASE=1, vanilla=-1), "naive - vanilla": dict(naive=1, vanilla=-1),
    "ASE - naive": dict(ASE=1, naive=-1), "control - vanilla": dict(control=1, vanilla=-1),
    "ASE - control": dict(ASE=1, control=-1)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", nargs="+", metavar="RUN", help="append these runs to assets/study.jsonl")
    return data.command(parser, run, argv)


def run(args):
    for folder in args.add or ():
        with open(STUDY, "a", encoding="utf-8") as file:
            file.write(json.dumps(line_of(folder)) + "\n")
        print(f"added {folder}", flush=True)
    if args.add:
        return
    rows = read_lines()
    print("Differences of Δm within blocks (N, seed): mean [95% t interval], blocks\n")
    print(f"{'':26}{'first runs':>28}{'new runs (these test)':>28}{'all (these estimate)':>28}")
    for name, weights in EFFECTS.items():
        cells = []
        for new in (False, True, None):
            mean, half, blocks = effect(rows, weights, new)
            interval = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}] {blocks:3}"
            cells.append(interval if blocks > 1 else "–")
        print(f"{name:26}" + "".join(f"{cell:>28}" for cell in cells))
    heads = "".join(f"{task:>16}" for task in (*TASKS, "Δm"))
    print(f"\n{'mean ± standard deviation':26}{'runs':>5}{heads}")
    for (method, n), found in sorted(rows.items(), key=lambda row: (row[0][1], row[0][0])):
        columns = [[line["metrics"][task] for line, _ in found.values()] for task in TASKS]
        columns.append([gain for _, gain in found.values()])
        print(f"{method + (f', N = {n}' if n else ''):26}{len(found):5}"
              + "".join(f"{evaluate.cell(values, '.2f'):>16}" for values in columns))


if __name__ == "__main__":
    sys.exit(main())
