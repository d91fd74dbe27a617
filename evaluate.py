"""How predictions are judged: losses, metrics, Δm, the table, the pictures.

    python evaluate.py run/                            five metrics, Δm and pictures, all kept in run/
    python evaluate.py runs/* --baseline runs/stl_*    one table; runs that differ in the seed are one row
    python evaluate.py run/ photo.jpg                  what the run sees in a photo: run/photo.png

Protocol: that of Vandenhende et al. 2021 and M3ViT (Fan et al. 2022), whose numbers Table 1 of the ASE paper
continues; of the published variants of odsF, which README lists, ASTMT's. The network sees S×S; predictions
are brought to each image's own size and compared there with the untouched truth. That is what training learns
from, but for edges: training has the thinned Laplacian of the LabelMap, as the field's loaders do; odsF is
judged against its thinned `seg2bmap`, as in SEISM.

Shapes: B images · C channels · S side of the network's input · H, W an image's own size · K thresholds.
"""

import argparse
import contextlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage

import ase
import data
from data import IGNORE, TASKS, UserError, legend_of, paint, removable, sheet, thin


# ----------------------------------------------------------------------------------------------------- losses


def count_pixels(targets):
    """What losses divide by: pixels with ground truth and, among them, those of class 1. → (T, 2)."""
    counts = []
    for target in targets.values():
        valid = target.any(1) if target.dim() == 4 else target != IGNORE
        counts.append(torch.stack([valid.sum(), (target == 1).sum()]))
    return torch.stack(counts)


def cross_entropy(prediction, target, valid, positive):
    """Mean over the pixels with ground truth, 0 without. prediction (B, C, S, S), target (B, S, S)."""
    return F.cross_entropy(prediction, target, ignore_index=IGNORE, reduction="sum") / valid.clamp(min=1)


def _weighted_bce(prediction, target, weight):
    """Σ over pixels of the binary cross-entropy, positives × weight, negatives × (1 − weight)."""
    weights = torch.where(target == 1, weight, 1 - weight) * (target != IGNORE)
    truth = (target == 1).float()
    return F.binary_cross_entropy_with_logits(prediction[:, 0], truth, weights, reduction="sum")


def balanced_bce(prediction, target, valid, positive):
    """Binary cross-entropy with w = share of negatives: [w Σ_pos + (1 − w) Σ_neg] / pixels."""
    valid = valid.clamp(min=1)
    return _weighted_bce(prediction, target, 1 - positive / valid) / valid


def edge_bce(prediction, target, valid, positive):
    """The same with w = 0.95, whatever the batch."""
    weight = torch.full((), 0.95, device=target.device)
    return _weighted_bce(prediction, target, weight) / valid.clamp(min=1)


def normals_l1(prediction, target, valid, positive):
    """Mean |component| between the normalised prediction and the truth, if any. Both (B, 3, S, S)."""
    error = (data.unit(prediction) - target).abs() * target.any(1, keepdim=True)
    return error.sum() / (3 * valid).clamp(min=1)


LOSSES = {f.__name__: f for f in (cross_entropy, balanced_bce, edge_bce, normals_l1)}


def losses(predictions, targets, counts=None):
    """{task: loss} of raw predictions {task: (B, C, S, S)}.

    counts: `count_pixels` summed over the effective batch, of which these images may be a part; then the
    losses of the parts add up to that of the whole.
    """
    targets = {task: targets[task] for task in predictions}
    counts = count_pixels(targets) if counts is None else counts
    return {task: LOSSES[TASKS[task].loss](predictions[task].float(), targets[task], *counts[n])
            for n, task in enumerate(targets)}


# ---------------------------------------------------------------------------------------------------- metrics


class Protocol(NamedTuple):
    """Which of the published variants of odsF: the default is that of ASTMT."""

    nms: bool = True
    thresholds: int = 101

    def levels(self):
        """The thresholds: 0.001, 0.01 … 0.99, 0.999, or 99 of them, 0.01 … 0.99."""
        return THRESHOLDS[1:-1] if self.thresholds == 99 else THRESHOLDS


class Metric:
    """How tasks of a kind are judged. A subclass has `count(prediction, truth, channels, protocol)`, numbers
    of an image that add up over a split, and `value(total)` of their sum, NaN without any truth."""

    constant = ()  # the output that knows nothing: its first channels, the others are 0

    def activate(self, output):
        """The model's output (C, S, S), or a constant's (C, 1, 1) → what is brought to native size."""
        return output.sigmoid()

    def decide(self, native):
        """That, at native size (C, H, W) → the prediction that is compared and drawn."""
        return native[0]


class MeanIoU(Metric):
    """Mean of right / (predicted + true − right) over the classes that occur, in percent."""

    constant = (1,)

    def activate(self, output):
        return output

    def decide(self, native):
        return native.max(0).indices  # argmax(0) in a third of the time

    def count(self, prediction, truth, channels, protocol):
        """(C, 3) pixels with ground truth: right, predicted, true."""
        known = truth != IGNORE
        prediction, truth = prediction[known], truth[known]
        right = prediction[prediction == truth]
        return np.stack([np.bincount(x, minlength=channels) for x in (right, prediction, truth)], 1)

    def value(self, total):
        right, predicted, true = total[total.any(1)].T
        return 100 * float(np.mean(right / (predicted + true - right))) if right.size else math.nan


class MaxIoU(Metric):
    """The foreground's Jaccard index (1 if both are empty), mean over images, at the best threshold."""

    constant = (9,)
    thresholds = np.arange(20, 91, 5) / 100

    def count(self, prediction, truth, channels, protocol):
        """(15, 3): at each threshold the index, 1, and the pixels of the true foreground."""
        truth = truth == 1
        found = prediction > self.thresholds[:, None, None].astype(prediction.dtype)     # (15, H, W)
        both = (found & truth).sum((1, 2))
        either = found.sum((1, 2)) + truth.sum() - both
        index = np.where(either > 0, both / np.maximum(either, 1), 1.0)
        return np.stack([index, np.ones(len(both)), np.full(len(both), truth.sum())], 1)

    def value(self, total):
        return 100 * float((total[:, 0] / total[:, 1]).max()) if total[0, 2] else math.nan


class MeanAngle(Metric):
    """The mean angle between unit vectors, over all pixels of the split, in degrees."""

    constant = (0, 0, 1)

    def activate(self, output):
        return data.unit(output, 0)

    def decide(self, native):
        return data.unit(native, 0)

    def count(self, prediction, truth, channels, protocol):
        """(2,): the sum of the angles where there is truth, and their number."""
        known = truth.any(0)
        p, g = prediction[:, known].astype(np.float64), truth[:, known].astype(np.float64)
        # arccos loses half of its digits near 0° and 180°; this does not
        angle = 2 * np.arctan2(np.linalg.norm(p - g, axis=0), np.linalg.norm(p + g, axis=0))
        return np.array([np.degrees(angle).sum(), known.sum()])

    def value(self, total):
        return float(total[0] / total[1]) if total[1] else math.nan


class OdsF(Metric):
    """The best F of edges over the thresholds, pixels matched one to one: see `edge_counts` and `ods_f`."""

    constant = (-9,)

    def count(self, prediction, truth, channels, protocol):
        return edge_counts(prediction, truth, protocol.levels(), nms=protocol.nms)

    def value(self, total):
        return ods_f(total)


METRICS = {"miou": MeanIoU(), "max_iou": MaxIoU(), "odsf": OdsF(), "angle": MeanAngle()}


def metric_of(task):
    return METRICS[TASKS[task].metric]


# ------------------------------------------------------------------------------------------------------ edges

THRESHOLDS = np.r_[0.001, np.arange(1, 100) / 100, 0.999]  # 101 of them; THRESHOLDS[1:-1] are the 99 of MTLP


def seg2bmap(labels):
    """The boundaries between labels as the BSDS benchmark draws them (Martin 2003): (H, W) integers → bool.

    A pixel is boundary where its label is not that of its east, south or south-east neighbour; in the last
    row only east counts, in the last column only south. Thinned, this is the truth of odsF.
    """
    x = np.pad(labels, (0, 1), mode="edge")  # beyond the border nothing changes
    here = x[:-1, :-1]
    return (here != x[:-1, 1:]) | (here != x[1:, :-1]) | (here != x[1:, 1:])


def suppress(prob):
    """Non-maximum suppression across the edge, as in the structured-edges toolbox (Dollár and Zitnick 2015).

    prob: (H, W) float, H and W at least 2. Returns a new array of the same shape and type.
    """
    triangle = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    smooth = ndimage.convolve1d(prob, triangle, axis=0, mode="reflect")
    smooth = ndimage.convolve1d(smooth, triangle, axis=1, mode="reflect")
    oy, ox = np.gradient(smooth)
    oxx = np.gradient(ox, axis=1)
    oyy, oxy = np.gradient(oy)
    angle = np.arctan(oyy * np.sign(-oxy) / (oxx + 1e-5)) % np.pi  # of the normal to the edge

    h, w = prob.shape
    y, x = np.mgrid[:h, :w]
    kept = prob.copy()
    for side in (1, -1):
        at = np.clip(y + side * np.sin(angle), 0, h - 1), np.clip(x + side * np.cos(angle), 0, w - 1)
        kept[1.01 * prob < ndimage.map_coordinates(prob, at, order=1)] = 0

    margin = min(5, h // 2, w // 2)  # what lies at the border is noise; in the corners both borders count
    for d in range(margin):
        for line in kept[d], kept[-1 - d], kept[:, d], kept[:, -1 - d]:
            line *= d / margin
    return kept


def thin_words(words):
    """`thin` to convergence for many sparse maps: words (J, H, W) unsigned, one bit a map.

    In one flat array with a margin a neighbour is a fixed number of places away. A half-pass looks again only
    at pixels around which something changed since it last did: 9 to 24 times as fast as `thin` on 101
    thresholds of one 500×375 image.
    """
    p = np.pad(words, ((0, 0), (1, 1), (1, 1)))
    flat = p.reshape(-1)
    row = p.shape[-1]
    ring = [1, 1 - row, -row, -row - 1, -1, row - 1, row, row + 1]  # E NE N NW W SW S SE
    todo = [flat != 0, flat != 0]  # for each half-pass
    while todo[0].any() or todo[1].any():
        at = np.flatnonzero(todo[0])
        todo[0][:] = False
        gone = flat[at] & removable(*[flat[at + step] for step in ring])
        flat[at] ^= gone
        changed = at[gone != 0]
        for step in ring + [0]:
            todo[0][changed + step] = True
            todo[1][changed + step] = True
        todo = [todo[1] & (flat != 0), todo[0] & (flat != 0)]  # the other half-pass is next
        ring = ring[4:] + ring[:4]
    return p[:, 1:-1, 1:-1]


def threshold_bits(prob, thresholds):
    """(H, W) probabilities, K ascending thresholds -> (J, H, W) uint64: bit k % 64 of word k // 64."""
    count = len(thresholds)
    levels = np.searchsorted(thresholds, prob)  # how many thresholds lie below: all of their bits are set
    bits = np.arange(-(-count // 64) * 64) < np.arange(count + 1)[:, None]
    table = np.packbits(bits, axis=1, bitorder="little").view("<u8")  # (K + 1, J)
    return np.stack([column[levels] for column in table.T])


def within_reach(predicted, gt, reach):
    """For each pixel of `predicted`, in row order: numbers of the truth pixels in reach, nearest first."""
    r = int(reach)
    steps = [(np.hypot(i, j), i, j) for i in range(-r, r + 1) for j in range(-r, r + 1)]
    number = np.where(predicted, np.cumsum(predicted).reshape(predicted.shape) - 1, -1)
    number = np.pad(number, r, constant_values=-1)
    at = np.flatnonzero(np.pad(gt, r))
    found = [number.reshape(-1)[at + i * number.shape[1] + j] for d, i, j in sorted(steps) if d <= reach]
    found = np.stack(found)  # (steps, truth pixels): the predicted pixel there, or -1
    step, truth = np.nonzero(found >= 0)
    pixel = found[step, truth]
    order = np.argsort(pixel, kind="stable")
    ends = np.cumsum(np.bincount(pixel, minlength=predicted.sum())).tolist()
    truth = truth[order].tolist()
    return [truth[start:end] for start, end in zip([0] + ends, ends)]


def augmenting_path(start, links, owner, closed):
    """A way from the predicted pixel `start` to a free truth pixel, over truth pixels that are not `closed`.

    The picture: `start` asks its truth pixels; where all have an owner, each owner is asked for another one,
    and so on. Returns the free truth pixel (-1: there is none) and {truth pixel: who asked for it}. Depth
    first: where much is matched, breadth first would look at a growing disc before it finds a way out.
    """
    asked, stack = {}, [start]
    while stack:
        pixel = stack.pop()
        for truth in links[pixel]:
            if owner[truth] < 0:
                asked[truth] = pixel
                return truth, asked
        for truth in links[pixel]:
            if truth not in asked and truth not in closed:
                asked[truth] = pixel
                stack.append(owner[truth])
    return -1, asked


def match(links, truths, kept):
    """How many pairs a maximum one-to-one matching has, for each threshold: a list of K numbers.

    links: for each of n predicted pixels, the truth pixels (numbers below `truths`) it may be matched with.
    kept: (K, n) bool, the predicted pixels that threshold k has; neighbouring rows should differ little.

    Berge's theorem: a matching is maximum when no path leads from an unmatched predicted pixel, by turns over
    a free link and a matched one, to an unmatched truth pixel. Each such path makes one pair more.
    """
    near = np.array([len(link) > 0 for link in links], dtype=bool)
    mate = [-1] * len(links)  # of each predicted pixel
    owner = [-1] * truths  # of each truth pixel
    before = np.zeros(len(links), dtype=bool)
    unmatched, sizes = [], []  # predicted pixels without a mate
    for now in kept[::-1] & near:  # from few pixels to many: what was matched stays matched where it can
        for pixel in np.flatnonzero(before & ~now).tolist():
            if mate[pixel] >= 0:
                owner[mate[pixel]] = -1
                mate[pixel] = -1
        todo = [pixel for pixel in unmatched if now[pixel]] + np.flatnonzero(now & ~before).tolist()
        before, unmatched, closed = now, [], set()
        for pixel in todo:
            truth, asked = augmenting_path(pixel, links, owner, closed)
            if truth < 0:
                unmatched.append(pixel)
                closed.update(asked)  # no way leads on from these, and no later path changes that
            while truth >= 0:  # back along the path: each predicted pixel takes the truth it has asked for
                pixel = asked[truth]
                owner[truth] = pixel
                mate[pixel], truth = truth, mate[pixel]
        sizes.append(int(now.sum()) - len(unmatched))
    return sizes[::-1]


def edge_counts(prob, gt, thresholds, max_dist=0.0075, nms=True):
    """Counts for odsF of one image -> (K, 3) int64: matched, predicted (after thinning) and truth pixels.

    prob: (H, W) float in [0, 1], at the truth's own size. gt: (H, W) bool, thin. thresholds: K numbers;
    predicted is what lies above, strictly. A pair may match up to max_dist × the image's diagonal
    (4.7 pixels at 500×375), one to one. Sum the counts over the images, then `ods_f`.
    ValueError: two shapes, no floats, or NaN.
    """
    prob, gt = np.asarray(prob), np.asarray(gt, dtype=bool)
    if prob.ndim != 2 or prob.shape != gt.shape or prob.dtype.kind != "f" or np.isnan(prob).any():
        raise ValueError(f"found {prob.dtype} edges {prob.shape} for a truth of {gt.shape}: expected floats "
                         "in [0, 1], no NaN, and (H, W) for both")
    if nms:
        prob = suppress(prob)
    thresholds = np.asarray(thresholds, dtype=prob.dtype)  # 0.2 in float32 is not above 0.2
    order = np.argsort(thresholds)
    words = thin_words(threshold_bits(prob, thresholds[order]))

    predicted = words.any(axis=0)  # by any threshold: n pixels
    octets = np.ascontiguousarray(words[:, predicted].T).view(np.uint8)
    kept = np.unpackbits(octets, axis=1, bitorder="little", count=len(order))
    kept = kept.T.astype(bool, order="C")  # (K, n)
    links = within_reach(predicted, gt, max_dist * np.hypot(*gt.shape))

    counts = np.empty((len(order), 3), dtype=np.int64)
    counts[order, 0] = match(links, int(gt.sum()), kept)
    counts[order, 1] = kept.sum(axis=1)
    counts[:, 2] = gt.sum()
    return counts


def ods_f(counts):
    """(K, 3) counts, summed over the images -> the largest F, in percent; NaN where there is no truth."""
    matched, predicted, truth = np.asarray(counts).T
    if not truth.any():
        return float("nan")
    # P = matched / predicted, R = matched / truth: F = 2PR / (P + R) = 2 · matched / (predicted + truth)
    return float(100 * (2 * matched / (predicted + truth)).max())


# -------------------------------------------------------------------------------------------- judging a model


def to_input(model, image, mean_std, device):
    """Image (3, H, W) uint8 of any size → what the model takes, (1, 3, S, S)."""
    side = model.config.image
    x = F.interpolate(torch.from_numpy(image)[None].to(device).float(), (side, side), mode="bilinear")
    return data.normalise(x, mean_std)


@torch.inference_mode()
def predict(model, image, mean_std, device):
    """Image (3, H, W) uint8 of any size → {task: (C, S, S) activated output, numpy}.

    One at a time: in a batch the last bits depend on what else is in it, and so would the counts.
    """
    with data.autocast(device):
        outputs, _ = model.eval()(to_input(model, image, mean_std, device))
    return {task: metric_of(task).activate(x[0].float()).cpu().numpy() for task, x in outputs.items()}


def to_native(activated, size):
    """{task: (C, S, S)} → {task: prediction of size (H, W)}, for `data.paint` and `Metric.count`."""
    predictions = {}
    for task, x in activated.items():
        native = F.interpolate(torch.from_numpy(x)[None], size, mode="bilinear")[0]
        predictions[task] = metric_of(task).decide(native).numpy()
    return predictions


def read_truth(root, id, tasks, image=None):
    """An image (3, H, W) uint8, and what its predictions are compared with and drawn beside: {task: truth},
    from the files of these tasks (`image`, where given, is not read again)."""
    maps = data.maps_of(tasks)
    planes = torch.from_numpy(data.read_planes(root, id, maps, image))
    truth = data.targets(planes[None], tasks, edges=lambda labels: torch.from_numpy(
        thin(seg2bmap(labels[0].numpy())))[None])  # SEISM's edges; training has others
    return data.pick(planes, "image", maps).numpy(), {task: x[0].numpy() for task, x in truth.items()}


def _compare(job):
    """One image in a worker: the model's outputs and a constant's beside its truth → two {task: counts}."""
    root, id, image, activated, protocol = job
    counts, of_constant = {}, {}
    _, truth = read_truth(root, id, list(activated), image)
    for task, prediction in to_native(activated, image.shape[1:]).items():
        metric, channels = metric_of(task), TASKS[task].channels
        counts[task] = metric.count(prediction, truth[task], channels, protocol)
        constant = torch.zeros(channels, 1, 1)
        constant[:len(metric.constant), 0, 0] = torch.tensor(metric.constant, dtype=torch.float32)
        constant = np.broadcast_to(metric.decide(metric.activate(constant)).numpy(), prediction.shape)
        of_constant[task] = metric.count(constant, truth[task], channels, protocol)
    return counts, of_constant


def accumulate(model, dataset, mean_std, device, protocol=Protocol()):
    """{task: counts} of a model, summed over a split, and the same of a constant prediction. The model runs
    here, the counts are made by workers, one image a job."""
    def jobs():
        for id in dataset.ids:
            image = data.read_map(dataset.root, "image", id, None)
            yield dataset.root, id, image, predict(model, image, mean_std, device), protocol

    sums = {}, {}
    for results in data.parallel(_compare, jobs(), len(dataset), "evaluate"):
        for total, counts in zip(sums, results):
            for task in counts:
                total[task] = total.get(task, 0) + counts[task]
    return sums


def evaluate(model, dataset, mean_std="imagenet", device="cpu", protocol=Protocol()):
    """{task: metric} of a model on a `data.PascalContext`, at native size, in the units of `TASKS`."""
    counts, _ = accumulate(model, dataset, mean_std, torch.device(device), protocol)
    return {task: metric_of(task).value(total) for task, total in counts.items()}


def metrics_of(counts):
    """{task: metric} from counts summed over a split, as JSON has it: None for a task without any truth."""
    metrics = {task: metric_of(task).value(total) for task, total in counts.items()}
    return {task: None if math.isnan(value) else value for task, value in metrics.items()}


def iou_by_class(task, total):
    """{class: IoU in percent, None where it does not occur} from `MeanIoU`'s counts."""
    return {name: 100 * right / (predicted + true - right) if predicted + true else None
            for name, (right, predicted, true) in zip(TASKS[task].classes, total.tolist())}


# ----------------------------------------------------------------------------------------- Δm and baselines

PASCAL_VAL = 5105  # images of PASCAL-Context's validation split, on which the published baselines were judged
BASELINES = {
    # Table 1 of the ASE paper: single-task ResNet-18 on PASCAL-Context
    "resnet18": {"semseg": 60.1, "human_parts": 51.0, "sal": 63.2, "edge": 50.8, "normals": 15.4},
    # the survey of Vandenhende et al. 2021, its single-task baseline
    "survey": {"semseg": 66.2, "human_parts": 59.9, "sal": 66.3, "edge": 68.8, "normals": 13.9},
    # single-task models (--experts 0 --tasks TASK) of four seeds on the default demo: assets/study.md
    "demo": {"semseg": 46.41, "human_parts": 36.47, "sal": 62.24, "edge": 45.24, "normals": 20.73},
}


def delta_m(metrics, baseline):
    """Δm = 100/T Σ_t s_t (M_t − B_t) / B_t in percent, s = −1 if lower is better. A gap: UserError."""
    gains = []
    for task, value in metrics.items():
        if not baseline.get(task):
            raise UserError(f"the baseline's {task} is missing or 0: expected all of {', '.join(metrics)}; "
                            "name more runs, --baseline RUN…")
        sign = -1 if TASKS[task].lower_is_better else 1
        gains.append(sign * (value - baseline[task]) / baseline[task])
    return 100 * sum(gains) / len(gains)


def default_baseline(root):
    """The name of a data set's baseline; None where published figures would be those of other images."""
    if (root / "demo.json").is_file():
        return "demo" if json.loads((root / "demo.json").read_bytes()) == data.DEMO | {"seed": 0} else None
    return "resnet18" if len(data.read_ids(root, "val")) == PASCAL_VAL else None


# ------------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    folder: Path
    settings: dict  # config.json: what train.py has resolved, and "model", the fields of ase.Config
    config: ase.Config  # of the tasks that are computed: all, or some of them


def open_run(folder, tasks=None):
    """A run, for all its tasks or some, "semseg,edge". Raises UserError for what is no run of this code."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no run folder, it has no config.json: name one that train.py made")
    with data.reading(path, "broken, or made by other code; train again into another folder, --out DIR"):
        settings = json.loads(path.read_bytes())
        [settings[name] for name in ("data", "dataset", "mean_std", "epochs", "start", "tasks")]
        config = ase.Config(**settings["model"])
    return Run(Path(folder), settings, replace(config, tasks=choose(config.tasks, tasks)))


def load_checkpoint(folder):
    """What `train.py` saved last. Raises UserError where there is nothing, or a broken file."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: the run has not finished an epoch; start train.py again")
    with data.reading(path, "delete it and start train.py again"):
        checkpoint = ase.load(path)
        [checkpoint[name] for name in ("model", "optimizer", "epoch")]
        return checkpoint


def choose(known, names):
    """Those of {task: …} that are named as "semseg,edge", all without names. Raises UserError for others."""
    chosen = names.split(",") if names else [*known]
    for task in chosen:
        if task not in known or chosen.count(task) > 1:
            raise UserError(f"--tasks {names}: {task!r} is unknown or named twice; expected some of "
                            f"{','.join(known) or 'none, all are there'}")
    return {task: value for task, value in known.items() if task in chosen}


def load_model(run, device):
    """The trained model of a run, ready to predict `run.config.tasks`, which may be some of its tasks."""
    model = ase.ASE(run.config)
    state = load_checkpoint(run.folder)["model"]
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.to(device).eval()


def read_log(folder):
    """The records of a run's log.jsonl, [] where there is none; a crash may have cut the last line."""
    path, records = folder / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def select_ids(ids, path):
    """The ids that the file `path` lists, which must all be among `ids`."""
    with data.reading(path, "expected ids of val.txt, one a line"):
        wanted = list(dict.fromkeys(data.read_list(path)))
        unknown = sorted(set(wanted) - set(ids))
        if unknown or not wanted:
            raise ValueError(f"it lists {unknown[0] if unknown else 'no id'}")
        return wanted


def judge(run, args, device):
    """A run's result under the protocol that args asks for, and a function that keeps it in the run's folder,
    with pictures: None under any but the default protocol, and for other data than the run's own."""
    root = Path(args.data or run.settings["data"])
    dataset = data.PascalContext(root, "val", run.config.image, run.config.tasks)
    if args.ids:
        dataset.ids = select_ids(dataset.ids, args.ids)
    dataset.require_files()
    own = data.fingerprint(root) == run.settings["dataset"]
    protocol = Protocol(not args.no_nms, args.thresholds)
    model = load_model(run, device)
    counts, of_constant = accumulate(model, dataset, run.settings["mean_std"], device, protocol)
    notes = [f"{len(dataset)} images at native size, {root}" + ("" if own else ", not the run's own data")]
    notes += [f"{task}: the mean over the {total.any(1).sum()} of {len(total)} classes that occur"
              for task, total in counts.items() if TASKS[task].metric == "miou" and not total.any(1).all()]
    epoch, epochs = load_checkpoint(run.folder)["epoch"], run.settings["epochs"]
    notes += [f"{run.folder} is not finished: {epoch} of {epochs} epochs"] * (epoch < epochs)
    result = {"metrics": metrics_of(counts), "constant": metrics_of(of_constant), "notes": notes,
              "classes": {task: iou_by_class(task, counts[task]) for task in counts if TASKS[task].classes},
              "epoch": epoch, "baseline": default_baseline(root)}
    if "edge" in counts:
        result["edge"] = {"thresholds": protocol.levels().tolist(), "counts": counts["edge"].tolist()}

    def keep():
        data.write_json(run.folder / "metrics.json", result)
        draw_run(run, model, dataset, device)
        print(f"kept in {run.folder}: metrics.json and pictures")

    return result, keep if own and args.default else None


def results_of(runs, args, device, unwritten):
    """[(run, result)] of the finished ones. A metrics.json is taken where it is newer than the checkpoint and
    holds what is asked for, else the run is judged, and kept; an error in that is appended to `unwritten`."""
    rows = []
    for run in runs:
        saved, kept, result = run.folder / "checkpoint.pt", run.folder / "metrics.json", None
        if saved.is_file() and kept.is_file() and kept.stat().st_mtime >= saved.stat().st_mtime:
            with data.reading(kept, "delete it"):
                result = json.loads(kept.read_bytes())
                result = result if result["epoch"] >= run.settings["epochs"] else None
        epoch = (result or load_checkpoint(run.folder))["epoch"] if saved.is_file() else 0
        if epoch < run.settings["epochs"]:
            print(f"left out: {run.folder} has trained for {epoch} of its {run.settings['epochs']} epochs")
            continue
        own = not args.data or data.fingerprint(args.data) == run.settings["dataset"]
        if not result or not own or not args.default:
            result, keep = judge(run, args, device)
            try:
                if keep:
                    keep()
            except OSError as error:
                unwritten.append(error)
        rows.append((run, result))
    if runs and not rows:
        raise UserError("none of these runs is finished: name one alone to judge it as it is")
    return rows


# -------------------------------------------------------------------------------------------------- the table


def groups_of(rows):
    """[(name, [(run, result)])]: a row for runs that differ in nothing but the seed, and where files lie."""
    groups, named = {}, []
    for run, result in rows:
        flags = {k: v for k, v in run.settings.items() if k not in ("seed", "data", "weights", "extend")}
        groups.setdefault(json.dumps(flags, sort_keys=True), []).append((run, result))
    for group in groups.values():
        name = str(group[0][0].folder)
        if len(group) > 1:  # "ase ×2" of runs/ase-0 and runs/ase-1
            name = f"{re.sub('[-_.]?[0-9]+$', '', Path(name).name) or name} ×{len(group)}"
        named.append((name, group))
    return named


def cell(values, form):
    """Mean ± standard deviation of as many values as there are; "–" for a gap."""
    if not values or None in values:
        return "–"
    spread = f" ±{format(np.std(values, ddof=1), form.lstrip('+'))}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def parameters(run):
    """(all, trained) parameters of a run's model, in millions; of one that was extended, what was added."""
    with torch.device("meta"):
        counts = ase.count(ase.ASE(run.config))
        total, trained = (sum(n) for n in zip(*counts.values()))
        if run.settings["start"] == "extended":
            new = choose(ase.Config(**run.settings["model"]).tasks, ",".join(run.settings["tasks"]))
            counts = ase.count(ase.ASE(replace(run.config, tasks=new)))
            trained = sum(counts[part][1] for part in ase.OWN)
    return total / 1e6, trained / 1e6


def print_table(rows, name, baseline):
    """A row for each group of runs, then what is to be told of them. baseline: {task: value}, its name."""
    heads = [f"{task.title} {'↓' if task.lower_is_better else '↑'}" for task in TASKS.values()]
    table = [["", "", *TASKS, "", "", ""], ["run", "(N/k/S/r)", *heads, "Δm %", "params M", "trained"]]

    def add(label, numbers, metrics, *rest):
        cells = [cell(metrics.get(task), ".2f") for task in TASKS]
        table.append([label, numbers, *cells, *rest, *[""] * (3 - len(rest))])

    for label, group in groups_of(rows):
        run, c = group[0][0], group[0][0].config
        metrics = {task: [result["metrics"][task] for _, result in group] for task in c.tasks}
        gains = [delta_m(result["metrics"], baseline) if baseline and None not in result["metrics"].values()
                 else None for _, result in group]
        add(label, f"{c.experts}/{c.topk}/{c.shared}/{c.rank}" if c.experts else "no experts", metrics,
            cell(gains, "+.2f"), *(f"{number:.2f}" for number in parameters(run)))
    if baseline:
        add(f"baseline {name}" if name in BASELINES else "baseline", "",
            {task: [value] for task, value in baseline.items()})
    constant = {task: [*{r["constant"][task] for _, r in rows if task in r["constant"]}] for task in TASKS}
    add("constant", "", {task: found for task, found in constant.items() if len(found) == 1})

    print()
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *others in table:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:]))]
        print("  ".join(cells).rstrip())
    print("\n×: runs of several seeds, mean ± standard deviation" if len(groups_of(rows)) < len(rows) else "")
    for note in dict.fromkeys(note for _, result in rows for note in result["notes"]):
        print(note)
    print(f"baseline: {name}")


def baseline_of(rows, named, others, args):
    """(name, {task: value}) of what Δm compares these rows with: the `named` one, the mean of `others`, which
    are rows, too, or the default; (why there is none, {})."""
    if others:
        found = {task: [result["metrics"].get(task) for _, result in others] for task in TASKS}
        means = {task: np.mean([v for v in values if v is not None] or 0) for task, values in found.items()}
        return " ".join(args.baseline), {task: float(mean) for task, mean in means.items() if mean}
    if not args.default:
        return "none under this protocol; name runs, --baseline RUN…", {}
    name, *more = [named] if named else {result["baseline"] for _, result in rows}
    tasks = {task for _, result in rows for task in result["metrics"]}
    if more or not name or tasks - BASELINES[name].keys():
        return "none for this data set or these tasks; name runs, --baseline RUN…", {}
    return name, BASELINES[name]


# ----------------------------------------------------------------------------------------- python evaluate.py


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="RUN|PHOTO", help="runs, or one run and photos")
    parser.add_argument("--baseline", nargs="+", metavar="NAME|RUN", help="what Δm compares with: "
                        f"{', '.join(BASELINES)}, or runs (default: the data set's, demo or resnet18)")
    parser.add_argument("--data", metavar="DIR", help="the data set (default: the run's own)")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--no-nms", action="store_true", help="odsF without non-maximum suppression")
    parser.add_argument("--thresholds", type=int, choices=(99, 101), default=101, help="default 101")
    parser.add_argument("--ids", metavar="FILE", help="judge only the ids listed in FILE, one a line")
    parser.add_argument("--tasks", metavar="A,B", help="compute and judge these tasks alone (default all)")
    return data.command(parser, run, argv)


def run(args):
    device = data.pick_device(args.device)
    args.default = not (args.ids or args.tasks or args.no_nms or args.thresholds == 99)
    photos = [Path(path) for path in args.paths if Path(path).is_file()]
    folders = {Path(path).resolve(): path for path in args.paths if not Path(path).is_file()}
    runs = [open_run(path, args.tasks) for path in folders.values()]
    if not runs or photos and (len(runs) > 1 or len({photo.stem for photo in photos}) < len(photos)):
        raise UserError(f"{len(runs)} runs, {len(photos)} photos: expected runs, or one and different photos")
    if photos:
        model = load_model(runs[0], device)
        broken = []
        for photo in photos:
            try:
                draw_photo(runs[0], photo, model, device)
            except UserError as error:
                broken.append(str(error))
        if broken:
            raise UserError("; ".join(broken))
        return
    named = args.baseline[0] if args.baseline and {*args.baseline} <= BASELINES.keys() else None
    others = [] if named else [open_run(path) for path in args.baseline or ()]
    for task in set().union(*(run.config.tasks for run in runs)) if others else ():
        if not any(task in other.config.tasks for other in others):
            raise UserError(f"--baseline {' '.join(args.baseline)}: none has {task}; name more runs")
    unwritten, keep = [], None
    others = results_of(others, args, device, unwritten)
    if len(runs) > 1:
        rows = results_of(runs, args, device, unwritten)
    else:
        result, keep = judge(runs[0], args, device)
        rows = [(runs[0], result)]
    print_table(rows, *baseline_of(rows, named, others, args))
    if keep:
        keep()
    if unwritten:
        raise unwritten[0]


# --------------------------------------------------------------------------------------------------- pictures

def draw_predictions(path, samples):
    """Draw a row for each sample (image (H, W, 3) uint8, truth {task: array}, prediction {task: array}),
    truth beside prediction, arrays as `paint` takes them. Where truth is None (a photo), it is left out."""
    sides = [(1, "truth"), (2, "prediction")][samples[0][1] is None:]
    tasks = list(samples[0][2])
    columns = [(task, side, name) for task in tasks for side, name in sides]
    rows = [[sample[0]] + [paint(TASKS[task], sample[side][task]) for task, side, _ in columns]
            for sample in samples]
    titles = ["image", *(f"{task} {name}" for task, _, name in columns)]
    legend = []
    for task in tasks:
        maps = [sample[side][task] for sample in samples for side, _ in sides]
        legend += [(task, None), *legend_of(TASKS[task], maps)]
    sheet(rows, titles, legend, cell=min(280, 1980 // len(titles)), path=path)


BLUE, PALE, ORANGE, GREY = (31, 98, 170), (175, 200, 230), (230, 110, 20), (200, 200, 200)
PICTURES = ("predictions.png", "routing.png", "experts.png", "curves.png")


def shade(values):
    """Colours (..., 3) uint8 of values in [0, 1]: white, blue, black, by their root to show small ones."""
    return (255 * (1 - np.sqrt(values)[..., None]) ** (2.4, 1.1, 0.5)).astype(np.uint8)


def round_ticks(low, high):
    """At most seven round numbers, 1, 2 or 5 times a power of ten apart, from low to high."""
    least = max(high - low, 1e-9) / 6
    step = next(step for step in np.outer(10.0 ** np.arange(-10, 12), (1, 2, 5)).flat if step >= least)
    return np.arange(np.ceil(low / step - 1e-6), np.floor(high / step + 1e-6) + 1) * step + 0.0  # no -0


def plot(size, xlim, ylim, labels, series=(), heat=None, xticks=None, yticks=None):
    """A panel (H, W, 3) uint8 around axes of `size` (width, height), at twice that size: `sheet` shrinks it,
    which smooths the lines. Labels: title, x, y. Series: (xs, ys, colour, line width, or 0 for dots). Heat:
    (rows, columns, 3) uint8, fills the axes, first row on top. Ticks: numbers, round ones if None."""
    font, left, top = ImageFont.load_default(26), 136, 56
    right, bottom = left + 2 * size[0], top + 2 * size[1]
    panel = Image.new("RGB", (right + 60, bottom + 76), "white")
    draw = ImageDraw.Draw(panel)
    if heat is not None:
        panel.paste(Image.fromarray(heat).resize((right - left, bottom - top), Image.NEAREST), (left, top))
    for tick in round_ticks(*ylim) if yticks is None else yticks:
        y = np.interp(tick, ylim, (bottom, top))
        draw.line((left - 8, y, right if heat is None else left, y), "gainsboro", 2)
        draw.text((left - 12, y), f"{tick:g}", "dimgray", font, "rm")
    for tick in round_ticks(*xlim) if xticks is None else xticks:
        x = np.interp(tick, xlim, (left, right))
        draw.line((x, bottom, x, bottom + 8), "dimgray", 2)
        draw.text((x, bottom + 12), f"{tick:g}", "dimgray", font, "mt")
    draw.rectangle((left, top, right, bottom), outline="dimgray", width=2)
    for xs, ys, colour, width in series:
        points = [*zip(np.interp(xs, xlim, (left, right)), np.interp(ys, ylim, (bottom, top)))]
        if width and len(points) > 1:
            draw.line(points, colour, 2 * width, joint="curve")
        else:
            for x, y in points:
                draw.ellipse((x - 8, y - 8, x + 8, y + 8), colour, "white", 2)
    draw.text((left + 8, top - 14), labels[0], "black", font, "ls")
    draw.text(((left + right) / 2, bottom + 70), labels[1], "dimgray", font, "ms")
    draw.text((left - 12, top - 14), labels[2], "dimgray", font, "rs")
    return np.asarray(panel)


def draw_experts(path, epochs, tasks, shared):
    """Draw Fig. 4: the mean gate of each expert in each layer, task by task, at the first, third and last
    epoch. Epochs: (number, gates (layers, T, N), shared experts first). Without experts nothing is drawn."""
    gates = {number: np.array(values) for number, values in epochs}
    shown = [number for i, number in enumerate(gates) if i in (0, 2, len(gates) - 1)]
    if not shown or gates[shown[0]].size == 0:
        return
    layers, _, experts = gates[shown[0]].shape
    high = max(gates[number].max() for number in shown)
    size = (experts * max(5, 288 // experts), layers * max(9, 96 // layers))
    edge, top = shared + 0.5, layers + 0.5
    around = ([0.5, edge, edge, 0.5, 0.5], [0.5, 0.5, top, top, 0.5], ORANGE, 2)
    axes = dict(
        size=size, labels=("shared" if shared else "", "expert", "layer"), series=[around] if shared else (),
        xlim=(0.5, experts + 0.5), xticks=range(experts, 0, -(1 + experts // 9)),
        ylim=(0.5, top), yticks=range(layers, 0, -(1 + layers // 9)))
    rows = [[plot(heat=shade(gates[number][::-1, t] / high), **axes) for number in shown]
            for t in range(len(tasks))]
    ramp = shade(np.linspace(0, 1, size[0]))[None]
    bar = plot((size[0], 14), (0, high), (0, 1), ("", "mean gate", ""), heat=ramp, yticks=())
    titles = [f"epoch {number}" for number in shown]
    sheet([*rows, [bar]], titles, labels=tasks, cell=bar.shape[1] // 2, frame="white", path=path)


def draw_curves(path, records, shared=0, topk=0):
    """Draw each task's losses and, where there are `shared` experts, their share of the gates, from the
    records of log.jsonl. Without steps nothing is drawn."""
    steps, epochs = [{r["step"]: r for r in records if r["kind"] == kind} for kind in ("step", "epoch")]
    if not steps:
        return
    x, tasks = list(steps), list(next(iter(steps.values()))["losses"])
    window = np.ones(1 + len(x) // 20)
    axes = dict(size=(330, 190), xlim=(0, x[-1]))
    panels = []
    for task in tasks:
        train = [record["losses"][task] for record in steps.values()]
        val = [record["val"][task] for record in epochs.values()]
        mean = np.convolve(train, window, "same") / np.convolve(np.ones(len(x)), window, "same")
        lines = [(x, train, PALE, 1), (x, mean, BLUE, 2), (list(epochs), val, ORANGE, 0)]
        ylim = np.percentile(np.concatenate([train, val]), (0, 99))
        panels.append(plot(ylim=ylim, labels=(task, "step", "loss"), series=lines, **axes))
    legend = [("training loss, each log record", PALE),
              ("its running mean", BLUE), ("validation loss", ORANGE)]
    if shared and epochs:
        gates = np.array([record["gates"] for record in epochs.values()])  # (epochs, layers, T, N)
        shares = gates[..., :shared].sum(-1).mean(1).T                                   # (T, epochs)
        neutral = shared / (shared + topk)  # what they have where all logits are equal
        lines = [((0, x[-1]), (neutral, neutral), GREY, 2)]
        colours = [tuple(colour) for colour in data.PALETTE[1:1 + len(tasks)].tolist()]
        lines += [(list(epochs), share, colour, 2) for share, colour in zip(shares, colours)]
        ylim = 0, 1.1 * max(neutral, shares.max())
        panels.append(plot(ylim=ylim, labels=("gates of the shared experts", "step", "sum"), series=lines,
                           **axes))
        legend += [("shared experts:", None), (f"all logits equal: {shared}/{shared + topk}", GREY)]
        legend += zip(tasks, colours)
    rows = [panels[i:i + 3] for i in range(0, len(panels), 3)]
    sheet(rows, legend=legend, cell=panels[0].shape[1] // 2, frame="white", path=path)


@torch.inference_mode()
def gates_of(model, images, first=None):
    """Gates of the patches, or of all tokens from the `first` on: (layers with experts, T, B, P, N)."""
    first = 1 + model.config.registers if first is None else first
    met = []  # by the experts of each layer: they and their input (T, B, L, D)
    layers = [block.experts for block in model.eval().blocks if block.experts is not None]
    hooks = [layer.register_forward_pre_hook(lambda layer, x: met.append((layer, *x))) for layer in layers]
    model.features(images)
    for hook in hooks:
        hook.remove()
    gates = [ase.gate(layer.logits(x), layer.shared, layer.topk, layer.gating) for layer, x in met]
    return torch.stack(gates).unflatten(2, met[0][1].shape[1:3])[..., first:, :]


def draw_routing(path, model, samples, mean_std, device):
    """Draw the expert with the largest gate of each patch, in up to four layers, and the sum of the shared
    experts' gates, mean over layers. Samples: (image (H, W, 3) uint8, …, {task: prediction})."""
    c, rows, n = model.config, [], np.arange(model.config.experts)
    if not c.experts:
        return
    # hues far apart for neighbouring numbers; black for shared experts
    hsv = np.stack([158 * n % 256, 255 - 100 * (n % 3 == 1), 255 - 80 * (n % 3 == 2)], 1).astype(np.uint8)
    colours = np.array(Image.frombytes("HSV", (len(n), 1), hsv.tobytes()).convert("RGB"))[0]
    colours[:c.shared] = 0
    inputs = [to_input(model, image.transpose(2, 0, 1), mean_std, device) for image, *_ in samples]
    gates = np.stack([gates_of(model, x)[:, :, 0].cpu().numpy() for x in inputs])
    share = gates[..., :c.shared].sum(-1).mean(1)  # of gates (samples, layers, T, P, N)
    grey = np.uint8(255 - 255 * share / (share.max() or 1))[..., None].repeat(3, -1)
    shown = sorted({*np.linspace(0, gates.shape[1] - 1, 4).astype(int).tolist()})
    for i, (image, *_, predictions) in enumerate(samples):
        size = ImageOps.contain(Image.fromarray(image), (180, 180)).size
        for t, task in enumerate(c.tasks):
            maps = [colours[gates[i, layer, t].argmax(-1)] for layer in shown] + [grey[i, t]] * (c.shared > 0)
            maps = [Image.fromarray(x.reshape(c.image // c.patch, -1, 3)).resize(size, 0) for x in maps]
            rows.append([image, paint(TASKS[task], predictions[task]), *map(np.asarray, maps)])
    titles = ["image", "prediction", *(f"layer {layer + 1}" for layer in shown), "shared experts"]
    legend = [("largest gate: a sparse expert's (a colour each)", tuple(colours[-1].tolist())),
              ("a shared expert's", (0, 0, 0)), ("sum of the shared experts' gates", None)]
    legend += [(f"{x * share.max():.2g}", (int(255 - 255 * x),) * 3) for x in (0, 0.5, 1)]
    sheet(rows, titles[:len(rows[0])], legend[:None if c.shared else 1], [*c.tasks] * len(samples), path=path)


def draw_run(run, model, dataset, device):
    """All pictures of a run, into its folder."""
    spread = dataset.ids[::max(1, len(dataset) // 40)][:40]
    images = [read_truth(dataset.root, id, list(run.config.tasks)) for id in spread]

    def without_truth(image):
        return sum(not (x.any() if x.ndim == 3 else (x != IGNORE).any()) for x in image[1].values())

    best, samples = sorted(images, key=without_truth), []
    equal = sum(without_truth(image) == without_truth(best[0]) for image in best)
    for image, truth in best[:max(6, equal):max(1, equal // 6)][:6]:  # with people, spread over the split
        activated = predict(model, image, run.settings["mean_std"], device)
        samples.append((image.transpose(1, 2, 0), truth, to_native(activated, image.shape[1:])))
    draw_predictions(run.folder / "predictions.png", samples)
    config, records = run.config, read_log(run.folder)
    draw_routing(run.folder / "routing.png", model, samples[:2], run.settings["mean_std"], device)
    epochs = [(record["epoch"], record["gates"]) for record in records if record["kind"] == "epoch"]
    draw_experts(run.folder / "experts.png", epochs, run.settings["tasks"], config.shared)
    joint = config.experts and config.gating == "joint"
    draw_curves(run.folder / "curves.png", records, config.shared if joint else 0, config.topk)


def draw_photo(run, path, model, device):
    """A photo's predictions as one picture, run/NAME.png: turned as EXIF says, transparency on white."""
    out = run.folder / f"{path.stem}.png"
    if out.name in PICTURES or out.exists() and out.samefile(path):
        raise UserError(f"the predictions would replace {out}: rename {path}")
    with data.reading(path, "expected a photo that Pillow opens"):
        photo = Image.open(path)
        if photo.mode[0] in "IF":
            raise ValueError(f"it has the mode {photo.mode}: expected 8 bits a channel")
        photo.load()
        with contextlib.suppress(Exception):  # of malformed EXIF: the pixels are sound
            photo = ImageOps.exif_transpose(photo)
        if photo.has_transparency_data:
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo.convert("RGBA"))
        photo.thumbnail((2048, 2048))
        image = np.array(photo.convert("RGB")).transpose(2, 0, 1)
    activated = predict(model, image, run.settings["mean_std"], device)
    sample = image.transpose(1, 2, 0), None, to_native(activated, image.shape[1:])
    draw_predictions(out, [sample])
    draw_routing(out.with_stem(f"{out.stem}-routing"), model, [sample], run.settings["mean_std"], device)
    print(f"drawn: {out}")


if __name__ == "__main__":
    sys.exit(main())
