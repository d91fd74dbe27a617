"""How predictions are judged: losses, metrics, Δm, the table, the pictures.

    python evaluate.py run/                            five metrics, Δm and pictures, all kept in run/
    python evaluate.py runs/* --baseline runs/stl_*    one table; runs that differ in the seed are one row
    python evaluate.py study.jsonl                     the same from a study, kept by --record study.jsonl
    python evaluate.py run/ photo.jpg                  what the run sees in a photo: run/photo.png

Protocol: that of Vandenhende et al. 2021 and M3ViT (Fan et al. 2022), whose numbers Table 1 of the ASE paper
continues. The network sees S×S; its predictions are brought to each image's own size and compared there with
the untouched truth. That is what training learns from, but for edges: training has the thinned Laplacian of
the LabelMap, as the field's loaders do, and odsF is judged against its thinned `seg2bmap`, as in SEISM.

Shapes: B images · C channels · S side of the network's input · H, W an image's own height and width · K
thresholds.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import re
import sys
import time
import zlib
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
    """How tasks of a kind are judged, image by image: a subclass counts what adds up over a split."""

    constant = ()  # the output that knows nothing: its first channels, the others are 0

    def activate(self, output):
        """The model's output (C, S, S), or a constant's (C, 1, 1) → what is brought to native size."""
        return output.sigmoid()

    def decide(self, native):
        """That, at native size (C, H, W) → the prediction that is compared and drawn."""
        return native[0]

    def truth(self, target, labels):
        """What the prediction is compared with, from the target of training and the LabelMap (H, W)."""
        return target

    def count(self, prediction, truth, channels, protocol):
        """One image → an array of numbers that add up over images."""
        raise NotImplementedError

    def value(self, total):
        """The metric from the sum over a split; NaN without any truth."""
        raise NotImplementedError


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
        """(15, 2): at each threshold the index, and 1."""
        truth = truth == 1
        found = prediction > self.thresholds[:, None, None].astype(prediction.dtype)     # (15, H, W)
        both = (found & truth).sum((1, 2))
        either = found.sum((1, 2)) + truth.sum() - both
        return np.stack([np.where(either > 0, both / np.maximum(either, 1), 1.0), np.ones(len(both))], 1)

    def value(self, total):
        return 100 * float((total[:, 0] / total[:, 1]).max())


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

    def truth(self, target, labels):
        return thin(seg2bmap(labels))  # SEISM's, not the target of training

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

    A half-pass looks again only at pixels around which something changed since it last did: 9 to 24 times as
    fast as `thin` on 101 thresholds of one 500×375 image.
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
        todo = [todo[1] & (flat != 0), todo[0] & (flat != 0)]
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


def augmenting_path(start, links, owner, seen):
    """An alternating path from the predicted pixel `start` to an unmatched truth pixel, leaving out `seen`.

    Returns its end (-1: there is none) and {truth pixel: the predicted pixel it was reached from}. Depth
    first: where much is matched, breadth first would look at a growing disc before it finds a way out.
    """
    came = {}
    stack = [start]
    while stack:
        pixel = stack.pop()
        for truth in links[pixel]:
            if truth in came or truth in seen:
                continue
            came[truth] = pixel
            if owner[truth] < 0:
                return truth, came
            stack.append(owner[truth])
    return -1, came


# On a dense map a search looks at many truth pixels before it finds a way. What a longer one than this saw is
# left alone until the next round, which then has to be made: a guess that saves time, and changes no result.
LONG_SEARCH = 300  # truth pixels


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
    single = []  # the predicted pixels without a mate
    sizes = []
    for now in kept[::-1] & near:  # from few pixels to many: what was matched stays matched where it can
        for pixel in np.flatnonzero(before & ~now).tolist():
            if mate[pixel] >= 0:
                owner[mate[pixel]] = -1
                mate[pixel] = -1
        single = [pixel for pixel in single if now[pixel]] + np.flatnonzero(now & ~before).tolist()
        before = now
        proven = False
        while not proven:
            proven = True
            todo, single = single, []
            seen = set()
            for pixel in todo:
                truth, came = augmenting_path(pixel, links, owner, seen)
                if truth < 0:
                    single.append(pixel)
                    seen.update(came)  # no path leads on from these, and no later path changes that
                elif len(came) > LONG_SEARCH:
                    seen.update(came)
                    proven = False
                while truth >= 0:  # back along the path: each predicted pixel takes the next truth pixel
                    pixel = came[truth]
                    owner[truth] = pixel
                    mate[pixel], truth = truth, mate[pixel]
        sizes.append(int(now.sum()) - len(single))
    return sizes[::-1]


def edge_counts(prob, gt, thresholds, max_dist=0.0075, nms=True):
    """Counts for odsF of one image -> (K, 3) int64: matched, predicted (after thinning) and truth pixels.

    prob: (H, W) float in [0, 1], at the truth's own size. gt: (H, W) bool, thin. thresholds: K numbers;
    predicted is what lies above, strictly. A pair may match up to max_dist × the image's diagonal
    (4.7 pixels at 500×375), one to one. Sum the counts over the images, then `ods_f`.
    ValueError: two shapes, no floats, or NaN.
    """
    prob, gt = np.asarray(prob), np.asarray(gt, dtype=bool)
    if prob.ndim != 2 or prob.shape != gt.shape:
        raise ValueError(f"edge map {prob.shape} and truth {gt.shape} should be (H, W), both the same")
    if prob.dtype.kind != "f":
        raise ValueError(f"the edge map is {prob.dtype}; float probabilities in [0, 1] were expected")
    if np.isnan(prob).any():
        raise ValueError("the edge map holds NaN; probabilities in [0, 1] were expected")
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


@torch.inference_mode()
def predict(model, image, mean_std, device):
    """Image (3, H, W) uint8 of any size → {task: (C, S, S) activated output, numpy}.

    One at a time: in a batch the last bits depend on what else is in it, and so would the counts.
    """
    side = model.config.image
    x = F.interpolate(torch.from_numpy(image)[None].to(device).float(), (side, side), mode="bilinear")
    with data.autocast(device):
        outputs, _ = model.eval()(data.normalise(x, mean_std))
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
    targets = data.targets(planes[None], tasks)
    labels = data.labels_of(planes[None], maps)[0].numpy() if "labelmap" in maps else None
    truth = {task: metric_of(task).truth(targets[task][0].numpy(), labels) for task in tasks}
    return data.pick(planes, "image", maps).numpy(), truth


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
    """{task: counts} of a model, summed over a split, and the same of a constant prediction.

    The model runs here, the files are read and the counts made by workers, one image a job; memory does not
    grow with the number of images.
    """
    sums = {}, {}

    def jobs(readers):
        images = data.ahead(lambda id: data.read_map(dataset.root, "image", id, None), dataset.ids, readers)
        for id, image in zip(dataset.ids, images):
            yield dataset.root, id, image, predict(model, image, mean_std, device), protocol

    with concurrent.futures.ThreadPoolExecutor(2) as readers, data.workers() as pool:
        results = data.ahead(_compare, jobs(readers), pool, depth=4 * data.cores())
        for result in data.progress(results, len(dataset), "evaluate"):
            for total, counts in zip(sums, result):
                for task in counts:
                    total[task] = total.get(task, 0) + counts[task]
    return sums


def evaluate(model, dataset, mean_std="imagenet", device="cpu", protocol=Protocol()):
    """{task: metric} of a model on a `data.PascalContext`, at native size, in the units of `TASKS`."""
    counts, _ = accumulate(model, dataset, mean_std, torch.device(device), protocol)
    return {task: metric_of(task).value(total) for task, total in counts.items()}


# ----------------------------------------------------------------------------------------- Δm and baselines

PASCAL_VAL = 5105  # images of PASCAL-Context's validation split, on which the published baselines were judged
BASELINES = {
    # Table 1 of the ASE paper: single-task ResNet-18 on PASCAL-Context
    "resnet18": {"semseg": 60.1, "human_parts": 51.0, "sal": 63.2, "edge": 50.8, "normals": 15.4},
    # the survey of Vandenhende et al. 2021, its single-task baseline
    "survey": {"semseg": 66.2, "human_parts": 59.9, "sal": 66.3, "edge": 68.8, "normals": 13.9},
    # single-task models (--experts 0 --tasks TASK) of four seeds on the default demo: assets/study.jsonl
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


# ------------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    folder: Path
    settings: dict  # config.json: the flags of train.py as resolved, and "model", the fields of ase.Config
    config: ase.Config  # of the tasks that are computed: all, or some of them

    @property
    def whole(self):
        return len(self.config.tasks) == len(self.settings["model"]["tasks"])


def open_run(folder):
    """Read a run's config.json. Raises UserError for anything that is not a run of this code."""
    path = Path(folder) / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        config = ase.Config(**settings["model"])
        for task, channels in config.tasks.items():
            if channels != TASKS[task].channels:
                raise ValueError(f"{channels} channels for {task}, which has {TASKS[task].channels}")
        data.MEAN_STD[settings["mean_std"]], Path(settings["data"])
        return Run(Path(folder), settings, config)
    except OSError:
        raise UserError(f"{folder} is no run folder: it has no config.json; "
                        "name a folder that train.py made") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is broken, or made by other code ({type(error).__name__}: {error}): "
                        "train again into another folder, --out DIR") from None


def load_checkpoint(path):
    """What `train.py` saved. Raises UserError where there is nothing, or a broken file."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}: the run has not "
                        "finished its first epoch; start train.py again")
    try:
        checkpoint = ase.load(path)
        if not isinstance(checkpoint, dict) or not {"model", "optimizer", "epoch"} <= checkpoint.keys():
            raise ValueError(f"{path} does not hold a model, its optimizer and the epoch")
        return checkpoint
    except ValueError as error:
        raise UserError(f"{error}: delete it and start train.py again") from None


def with_tasks(config, tasks):
    """`config` for some of its tasks, named as "semseg,edge". Raises UserError for others."""
    tasks = tasks.split(",")
    unknown = [task for task in tasks if task not in config.tasks or tasks.count(task) > 1]
    if unknown:
        raise UserError(f"--tasks {','.join(tasks)}: {unknown[0]!r} is unknown or named twice; "
                        f"expected some of {','.join(config.tasks)}")
    return replace(config, tasks={task: n for task, n in config.tasks.items() if task in tasks})


def load_model(run, device):
    """The trained model of a run, ready to predict `run.config.tasks`, which may be some of its tasks."""
    model = ase.ASE(run.config)
    state = load_checkpoint(run.folder / "checkpoint.pt")["model"]
    try:
        if model.load_state_dict(state, strict=run.whole).missing_keys:
            raise RuntimeError
    except (RuntimeError, AttributeError, TypeError):
        raise UserError(f"{run.folder}/checkpoint.pt does not fit its config.json: train again") from None
    return model.to(device).eval()


def file_of(run, dataset, args):
    """Where a run's result is kept: metrics.json for the full default protocol, else a file of its own."""
    def short(name, text):
        return f"{name}-{zlib.crc32(text.encode()):08x}"

    trained_on, told = Path(run.settings["data"]), []
    # where that is gone, --data names the place where it is now
    if args.data and trained_on.exists() and not trained_on.samefile(dataset.root):
        told.append("data-" + short(dataset.root.resolve().name, str(dataset.root.resolve())))
    if args.ids:
        told.append("ids-" + short(Path(args.ids).stem, " ".join(dataset.ids)))
    told += ["tasks-" + "-".join(run.config.tasks)] * (not run.whole)
    told += ["quick"] * args.quick + ["no-nms"] * args.no_nms
    told += [f"thresholds-{args.thresholds}"] * (args.thresholds != Protocol().thresholds)
    return "-".join(["metrics", *told]) + ".json"


def kept(folder, file, key):
    """The result in a run's `file`, or None if that was computed from anything else."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((folder / file).read_bytes())
        return known if known["key"] == key else None


def metrics_of(counts):
    """{task: metric} from counts summed over a split, as JSON has it: None for a task without any truth."""
    metrics = {task: metric_of(task).value(total) for task, total in counts.items()}
    return {task: None if math.isnan(value) else value for task, value in metrics.items()}


def evaluate_run(run, args, device):
    """The results of a run. If this code has judged this checkpoint by this protocol before, the kept ones;
    else it is judged, drawn and kept."""
    root = Path(args.data or run.settings["data"])
    if not args.data and not root.exists():
        raise UserError(f"{run.folder} was trained on {root}, which is not there: name it, --data DIR")
    data.remove_leavings(run.folder)
    dataset = data.PascalContext(root, "val", run.config.image, run.config.tasks)
    if args.ids:
        dataset.ids = select_ids(dataset.ids, args.ids)
    protocol, file = Protocol(not args.no_nms, args.thresholds), file_of(run, dataset, args)
    if args.quick:
        dataset.ids = dataset.ids[::-(-len(dataset) // 50)]
    stats = [path.stat() for path in run.folder.glob("checkpoint.pt")]
    depends = [[(stat.st_size, stat.st_mtime_ns) for stat in stats], str(dataset.root.resolve()),
               dataset.ids, list(run.config.tasks), protocol, run.settings]
    code = b"".join(Path(path).read_bytes() for path in (ase.__file__, data.__file__, __file__))
    key = hashlib.sha256(json.dumps(depends).encode() + code).hexdigest()
    result = kept(run.folder, file, key)
    if result:
        print(f"{run.folder}: kept in {file} from {result['judged']}")
        return result
    start = time.time()
    model = load_model(run, device)
    counts, of_constant = accumulate(model, dataset, run.settings["mean_std"], device, protocol)
    seconds = round(time.time() - start, 1)
    print(f"{run.folder}: judged in {seconds:.0f} s")
    result = {"metrics": metrics_of(counts), "constant": metrics_of(of_constant), "baseline": None,
              "delta_m": None, "default_baseline": default_baseline(dataset.root),
              "images": len(dataset), "data": str(dataset.root.resolve()), "file": file,
              "judged": time.strftime("%Y-%m-%d %H:%M"), "seconds": seconds, "key": key}
    # how many classes occur, in prediction or truth, and how many there are
    result["classes"] = {task: [int(total.any(1).sum()), len(total)] for task, total in counts.items()
                         if TASKS[task].metric == "miou"}
    if "edge" in counts:
        result["edge"] = {"thresholds": protocol.levels().tolist(), "counts": counts["edge"].tolist(),
                          "nms": protocol.nms}
    data.write_json(run.folder / file, result | {"key": None})  # no picture that fails costs the figures
    draw_run(run, result, model, dataset, device)
    data.write_json(run.folder / file, result)
    return result


def read_log(folder):
    """The records of a run's log.jsonl, [] where there is none."""
    path, records = folder / "log.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        # a crash or a full disk may have cut a line
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if record["kind"] in ("step", "epoch") and record["step"] >= 0 and record["epoch"] >= 0:
                records.append(record)
    return records


# ----------------------------------------------------------------------------------------- python evaluate.py


def named_baseline(args, device):
    """What --baseline names, (name, {task: value}), judged where it is runs; None without it."""
    names = args.baseline or []
    if len(names) == 1 and names[0] in BASELINES:
        return names[0], BASELINES[names[0]]
    for name in names:
        if not Path(name).is_dir():
            raise UserError(f"--baseline {' '.join(names)}: {name} is no run folder; expected those, or one "
                            f"of {', '.join(BASELINES)}, alone")
    values = collections.defaultdict(list)
    for run in [open_run(name) for name in names]:
        for task, value in evaluate_run(run, args, device)["metrics"].items():
            values[task] += [] if value is None else [value]
    return (" ".join(names), {task: float(np.mean(v)) for task, v in values.items() if v}) if names else None


def common_baseline(results):
    """That of the data set, where these results have one in common; else (why none, {})."""
    name, *more = {result["default_baseline"] for result in results}
    tasks = {task for result in results for task in result["metrics"]}
    if more or name not in BASELINES or tasks - BASELINES[name].keys():
        return "none for this data set or these tasks; name runs, --baseline", {}
    return name, BASELINES[name]


def default_baseline(root):
    """The name of a data set's baseline, "none" where published figures would be those of other images."""
    made = root / "demo.json"
    if made.exists():
        with contextlib.suppress(OSError, ValueError):
            return "demo" if json.loads(made.read_bytes()) == data.DEMO | {"seed": 0} else "none"
        return "none"
    return "resnet18" if len(data.read_ids(root, "val")) == PASCAL_VAL else "none"


class Row(NamedTuple):
    """A judged run: a row of a table, a line of a study."""

    run: str        # its folder; in a study the folder's name
    settings: dict  # as in `Run`
    result: dict    # of `evaluate_run`
    epochs: list    # of `routers_of`

    @property
    def config(self):
        return with_tasks(ase.Config(**self.settings["model"]), ",".join(self.result["metrics"]))

    @property
    def trained(self):
        """For how many epochs."""
        return self.epochs[-1]["epoch"] if self.epochs else 0


def routers_of(folder):
    """What the routers of a run did, an entry for each epoch: means over its layers and tasks."""
    epochs = []
    for record in read_log(folder):
        if record["kind"] == "epoch":
            with contextlib.suppress(LookupError, TypeError, ValueError):
                found = dict.fromkeys(("shared_mass", "information", "scale"))
                if record["gates"]:
                    update, ffn = np.moveaxis(np.array(record["scale"], float), -1, 0)
                    found = {"shared_mass": np.mean(record["shared_mass"]),
                             "information": np.mean(record["mutual_information"]),
                             "scale": np.mean(update / ffn)}  # the experts' update, relative to the FFN's
                    found = {name: round(float(x), 5) for name, x in found.items()}
                conflict = {part: opposed(x) for part, x in record.get("conflict", {}).items()}
                epochs.append(found | {"epoch": record["epoch"], "conflict": conflict})
    return epochs


def identity(settings, without=()):
    """The flags of a run and of the one it extends, but for some of them. Of a path the end counts: data and
    weights may lie elsewhere."""
    flags = {"extend": None, "base": None, "seed": None} | settings | dict.fromkeys(without)
    for flag, parts in ("data", 1), ("weights", 2), ("extend", 1):
        flags[flag] = flags[flag] and "/".join(Path(flags[flag]).parts[-parts:])
    return flags | {"base": flags["base"] and identity(flags["base"], without)}


def seeds(settings):
    """The seed of a run and, where it extends one of another seed, of that: (0,) or (1, 0)."""
    before = seeds(settings["base"]) if settings.get("base") else ()
    return tuple(dict.fromkeys([settings.get("seed"), *before]))


def key_of(row, without=()):
    """A text that two rows share if their runs have the same flags, but for `without`, and were judged by the
    same protocol. Of a run that was extended its flags count, not its name."""
    facts = identity(row.settings, (*without, "extend")), row.result["file"], Path(row.result["data"]).name
    return json.dumps(facts, sort_keys=True)


def write_study(path, rows):
    """Keep rows of a table as a study: a line of JSON each, without where things lie."""
    told = ("metrics", "constant", "images", "data", "file", "classes", "default_baseline")
    text = ""
    for row in rows:
        result = {name: row.result[name] for name in told} | {"data": Path(row.result["data"]).name}
        kept = Row(Path(row.run).name, identity(row.settings), result, row.epochs)
        text += json.dumps(kept._asdict()) + "\n"
    data.write_atomically(path, lambda file: file.write(text.encode()))
    print(f"kept in {path}: {len(rows)} runs")


def read_study(path):
    """The rows that `write_study` has kept. Raises UserError for any other file."""
    try:
        rows = [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            key_of(row), row.config, routing(row), conflicts(row)
            [row.result[name] for name in ("constant", "images", "classes", "default_baseline")]
        if not rows:
            raise ValueError("it is empty")
        return rows
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no study ({type(error).__name__}: {error}): expected what evaluate.py "
                        "--record has written") from None


def groups_of(rows, each):
    """{name: rows} for a table: runs that differ in nothing but the seed are one row, but for `each`."""
    groups, named = {}, {}
    for n, row in enumerate(rows):
        groups.setdefault(n if each else (key_of(row, ["seed"]), row.trained), []).append(row)
    for group in groups.values():
        name = group[0].run
        if len(group) > 1:  # "ase" of runs/ase-0 and runs/ase-1
            name = re.sub(r"[-_.]?[0-9]+$", "", Path(name).name) or name
        names = (f"{name} ({n})" if n > 1 else name for n in itertools.count(1))
        named[next(name for name in names if name not in named)] = group
    return named


def title(name, group):
    return f"{name} ×{len(group)}" if len(group) > 1 else name


def standard_error(values):
    """Of the mean of independent values: their standard deviation / √n."""
    return np.std(values, ddof=1) / math.sqrt(len(values))


def cell(values, form, error=False):
    """Mean ± standard deviation, or ± standard error, of as many values as there are; "–" for a gap."""
    if not values or None in values:
        return "–"
    if len(values) == 1:
        return format(values[0], form)
    deviation = standard_error(values) if error else np.std(values, ddof=1)
    return f"{np.mean(values):{form}} ±{format(deviation, form.lstrip('+'))}"


def print_rows(rows):
    """Print lists of texts as a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:]))]
        print("  ".join(cells).rstrip())


def parameters(row):
    """(all, trained) parameters of a run's model, in millions; of one that extends another, what it added."""
    with torch.device("meta"):
        counts = ase.count(ase.ASE(row.config))
        total, trained = (sum(n) for n in zip(*counts.values()))
        if row.settings.get("extend"):
            new = with_tasks(ase.Config(**row.settings["model"]), row.settings["tasks"])
            trained = sum(n for part, (_, n) in ase.count(ase.ASE(new)).items() if part in ase.OWN)
    return total / 1e6, trained / 1e6


def difference(group, first, columns, numbers, form):
    """A group of runs less another one, run by run of one seed: the number of pairs, then for each column the
    mean difference ± its standard error, * beyond two of them. None where there are no two pairs.

    numbers: Row → {column: number}. A pair was judged on the same images by the same protocol; what is no
    task's number is compared where both have the same tasks.
    """
    def judged(row):
        tasks = "-tasks-" + "-".join(row.config.tasks)
        return row.result["file"].replace(tasks, ""), Path(row.result["data"]).name, row.result["images"]

    first = {(seeds(row.settings), judged(row)): row for row in first}
    pairs = [(row, first.get((seeds(row.settings), judged(row)))) for row in group]
    pairs = [pair for pair in pairs if pair[1]]
    if len(pairs) < 2:
        return None
    cells = [f"{len(pairs)} pairs"]
    for column in columns:
        gains = []
        for row, other in pairs:
            a, b = numbers(row).get(column), numbers(other).get(column)
            gap = None in (a, b) or column not in TASKS and row.config.tasks != other.config.tasks
            gains.append(None if gap else a - b)
        text = cell(gains, form, error=True)
        if text != "–" and len(gains) > 2 and abs(np.mean(gains)) > 2 * standard_error(gains):
            text += "*"
        cells.append(text)
    return cells if {*cells[1:]} != {"–"} else None


def print_table(groups, baseline, values):
    """A row for each group of runs, below it its difference to the first; then what is to be told of them.

    baseline: its name, or why there is none; values: {task: value} of it.
    """
    first = next(iter(groups))
    heads = [f"{task.title} {'↓' if task.lower_is_better else '↑'}" for task in TASKS.values()]
    table = [["", "", *TASKS, "", "", ""], ["run", "(N/k/S/r)", *heads, "Δm %", "params M", "trained"]]
    notes = collections.defaultdict(list)  # what is to be told → the groups it is told of

    def add(label, numbers, metrics, *rest):
        cells = (cell(metrics.get(task), ".2f") for task in TASKS)
        table.append([label, numbers, *cells, *rest, *[""] * (3 - len(rest))])

    for name, group in groups.items():
        c = group[0].config
        numbers = f"{c.experts}/{c.topk}/{c.shared}/{c.rank}" if c.experts else "no experts"
        gains = cell([row.result["delta_m"] for row in group], "+.2f", error=True)
        add(title(name, group), numbers,
            {task: [row.result["metrics"][task] for row in group] for task in c.tasks},
            gains, *(f"{number:.2f}" for number in parameters(group[0])))
        cells = name != first and difference(
            group, groups[first], [*TASKS, "Δm"],
            lambda row: row.result["metrics"] | {"Δm": row.result["delta_m"]}, "+.2f")
        if cells:
            table.append([f"  less {first}", *cells, "", ""])
        for result in (row.result for row in group):
            told = [f"{result['images']} images at native size, {result['data']}"]
            told += [f"{task}: the mean over the {found} of {classes} classes that occur"
                     for task, (found, classes) in result["classes"].items() if 0 < found < classes]
            told += [f"{task}: no truth in these images, and so no Δm"
                     for task, value in result["metrics"].items() if value is None]
            default = "" if result["file"] == "metrics.json" else ", which is not the full default protocol"
            for note in [*told, f"kept in {result['file']}{default}"]:
                notes[note] += [name] * (name not in notes[note])
    if values:
        label = f"baseline {baseline}" if baseline in BASELINES else "baseline"
        add(label, "", {task: [value] for task, value in values.items()})
    constant = collections.defaultdict(set)
    for row in itertools.chain(*groups.values()):
        for task, value in row.result["constant"].items():
            constant[task].add(value)
    add("constant", "", {task: [*values] if len(values) == 1 else None for task, values in constant.items()})
    print()
    print_rows(table)
    print()
    if any(len(group) > 1 for group in groups.values()):
        print("metrics: mean ± standard deviation of the runs; Δm: mean ± standard error")
    if any(cells[0].startswith("  less ") for cells in table):
        print("less: mean difference of pairs of one seed ± standard error, * beyond two of them "
              "(3 pairs or more)")
    for note, named in notes.items():
        print(note + (f" ({', '.join(named)})" if len(named) < len(groups) else ""))
    print(f"baseline: {baseline}")


def print_numbers(groups, numbers, heading):
    """A table of other numbers, `numbers(row)` → {column: number}, of the runs that have any."""
    groups = {name: [row for row in group if numbers(row)] for name, group in groups.items()}
    groups = {name: group for name, group in groups.items() if group}
    columns = list(dict.fromkeys(name for group in groups.values() for row in group for name in numbers(row)))
    table = [["", "", *columns]]
    for name, group in groups.items():
        cells = (cell([numbers(row).get(column) for row in group], ".3f") for column in columns)
        table.append([title(name, group), "", *cells])
        first = next(iter(groups))
        cells = name != first and difference(group, groups[first], columns, numbers, "+.3f")
        if cells:
            table.append([f"  less {first}", *cells])
    if groups:
        print(f"\n{heading}\n± as for metrics above")
        print_rows(table)


def routing(row):
    """What the routers of a run did at its end, for `print_numbers`."""
    if not row.epochs or row.epochs[-1]["shared_mass"] is None:
        return {}
    first, last = row.epochs[0], row.epochs[-1]
    masses = first["shared_mass"], last["shared_mass"], last["shared_mass"] - first["shared_mass"]
    columns = f"mass, epoch {first['epoch']}", "mass", "change"
    found = dict(zip(columns, masses if row.config.shared else 3 * [None]))
    return found | {"MI, nats": last["information"], "update/FFN": last["scale"]}


def conflicts(row):
    """How the tasks' gradients agreed at the end of a run, for `print_numbers`."""
    found = {}
    for part, (share, mean) in row.epochs[-1]["conflict"].items() if row.epochs else ():
        part = part.removesuffix(" experts")
        found |= {f"{part} < 0": share, f"{part}, mean": mean}
    return found


def select_ids(ids, path):
    """The ids that the file `path` lists, which must all be among `ids`."""
    try:
        wanted = list(dict.fromkeys(Path(path).read_text(encoding="utf-8").split()))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"cannot read the list of ids {path}: expected a text file, one id a line") from None
    unknown = sorted(set(wanted) - set(ids))
    if unknown or not wanted:
        raise UserError(f"{path} lists {unknown[0] if unknown else 'no id'}: "
                        "expected ids of val.txt, one a line")
    return wanted


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="RUN|PHOTO", help="run folders; photos, with one run")
    parser.add_argument("--baseline", nargs="+", metavar="NAME|RUN",
                        help=f"what Δm compares with: {', '.join(BASELINES)}, or runs whose metrics "
                             "together make one (default: demo on the default demo, resnet18 on "
                             "PASCAL-Context, else none)")
    parser.add_argument("--data", metavar="DIR",
                        help="the data set (default: the one the run was trained on)")
    parser.add_argument("--device", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--no-nms", action="store_true",
                        help="odsF without non-maximum suppression, as MTLP has it")
    parser.add_argument("--thresholds", type=int, choices=(99, 101), default=101,
                        help="of odsF: 99 is MTLP's 0.01 … 0.99, "
                             "101 adds 0.001 and 0.999 (default %(default)s)")
    parser.add_argument("--ids", metavar="FILE", help="judge only the ids listed in FILE, one a line")
    parser.add_argument("--tasks", metavar="A,B", help="compute and judge these tasks alone (default all)")
    parser.add_argument("--each", action="store_true",
                        help="a row for each run, also for those that differ in nothing but the seed")
    parser.add_argument("--only", metavar="A,B", help="these rows alone; differences are to the first")
    parser.add_argument("--record", metavar="FILE.jsonl",
                        help="keep all rows as a study, which is named like a run the next "
                             "time, and drawn as NAME.png here")
    parser.add_argument("--quick", action="store_true", help="judge at most 50 images, spread over the split")
    return data.command(parser, run, argv)


def run(args):
    device = data.pick_device(args.device)
    files = [Path(p) for p in args.paths if Path(p).is_file()]
    studies = [path for path in files if path.suffix == ".jsonl"]
    photos = [path for path in files if path not in studies]
    folders = [Path(p) for p in args.paths if Path(p) not in files]
    early = [f for f in folders if f.is_dir() and not (f / "checkpoint.pt").is_file()]
    if early and len(early) < len(folders):
        print(f"left out, without a checkpoint yet: {', '.join(map(str, early))}")
        folders = [folder for folder in folders if folder not in early]
    runs = [open_run(folder) for folder in folders]
    if args.tasks:
        runs = [run._replace(config=with_tasks(run.config, args.tasks)) for run in runs]
    if args.tasks and studies:
        raise UserError(f"--tasks {args.tasks}: a study keeps runs as they were judged; name run folders")
    if not runs and (photos or not studies):
        raise UserError(f"no run folder among {', '.join(args.paths)}: "
                        "name the one train.py made, such as run/")
    if photos:
        if len(runs) > 1:
            raise UserError(f"{len(runs)} runs and photos: name one run with them")
        names = collections.Counter(photo.stem for photo in photos)
        twice = [str(photo) for photo in photos if names[photo.stem] > 1]
        if twice:
            raise UserError(f"{' and '.join(twice)} would be drawn into one picture: rename one")
        model = load_model(runs[0], device)
        for photo in photos:
            draw_photo(runs[0], photo, model, device)
        return
    record = args.record and Path(args.record)
    if record:
        if record.suffix != ".jsonl" or not record.parent.is_dir():
            raise UserError(f"--record {record}: expected a name in a folder that is there, ending in .jsonl")
        studies = [record] * record.exists() + studies
    rows = {key_of(row): row for path in studies for row in read_study(path)}
    named = named_baseline(args, device)
    for run in runs:
        row = Row(str(run.folder), run.settings, evaluate_run(run, args, device), routers_of(run.folder))
        same = rows.get(key_of(row))
        if same and same.trained > row.trained:
            print(f"{row.run} is left out: {same.run} has its flags, and has trained for more epochs")
            continue
        told = [(Path(r.run).name, r.result["metrics"]) for r in (same, row) if r]
        if same and told[0] != told[1]:
            print(f"{row.run} takes the place of {same.run}, which has its flags: they are one run here")
        rows[key_of(row)] = row
    groups = groups_of([*rows.values()], args.each)
    if args.only:
        only = args.only.split(",")
        unknown = [name for name in only if name not in groups]
        if unknown:
            raise UserError(f"--only {args.only}: there is no row {unknown[0]!r}; expected some of "
                            f"{', '.join(groups)}")
        groups = {name: groups[name] for name in only}
    shown = [*itertools.chain(*groups.values())]
    baseline, values = named or common_baseline([row.result for row in shown])
    for row in shown:
        result = row.result
        before = dict(result)
        result["baseline"], result["delta_m"] = (baseline if values else None), None
        if values and None not in result["metrics"].values():
            result["delta_m"] = delta_m(result["metrics"], values)
        if result != before and "key" in result:  # a run's own file, not a line of a study
            data.write_json(Path(row.run) / result["file"], result)
    print_table(groups, baseline, values)
    if record:
        write_study(record, [*rows.values()])
    for study in ([record] if record else studies)[:1]:
        print_numbers(groups, routing, "after the last epoch: gates of the shared experts (mass), mutual "
                      "information, the experts' update divided\nby the FFN's output; means over layers and "
                      "tasks")
        print_numbers(groups, conflicts, "after the last epoch: cosines of the gradients of each pair of "
                      "tasks, the share below 0 and the mean")
        draw_study(f"{study.stem}.png", groups)
        print(f"drawn: {study.stem}.png")
    if runs:
        pictures = sorted(p.name for p in runs[0].folder.glob("*.png"))
        print(f"pictures in {runs[0].folder}: {', '.join(pictures)}")


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
    which smooths the lines. Labels: title, x, y. Series: (xs, ys, colour, line width, or 0 for dots, name at
    its end), clipped to the axes. Heat: (rows, columns, 3) uint8, fills the axes, first row on top. Ticks:
    numbers, or {number: text}."""
    def named(ticks, lim):
        ticks = round_ticks(*lim) if ticks is None else ticks
        return ticks if isinstance(ticks, dict) else {tick: f"{tick:g}" for tick in ticks}

    font, xticks, yticks = ImageFont.load_default(26), named(xticks, xlim), named(yticks, ylim)
    left, top = max([136, *(24 + int(font.getlength(text)) for text in yticks.values())]), 56
    right, bottom = left + 2 * size[0], top + 2 * size[1]
    panel = Image.new("RGB", (right + 60, bottom + 76), "white")
    draw = ImageDraw.Draw(panel)
    if heat is not None:
        panel.paste(Image.fromarray(heat).resize((right - left, bottom - top), Image.NEAREST), (left, top))
    for tick, text in yticks.items():
        y = np.interp(tick, ylim, (bottom, top))
        draw.line((left - 8, y, right if heat is None else left, y), "gainsboro", 2)
        draw.text((left - 12, y), text, "dimgray", font, "rm")
    for tick, text in xticks.items():
        x = np.interp(tick, xlim, (left, right))
        draw.line((x, bottom, x, bottom + 8), "dimgray", 2)
        draw.text((x, bottom + 12), text, "dimgray", font, "mt")
    draw.rectangle((left, top, right, bottom), outline="dimgray", width=2)
    for xs, ys, colour, width, name in series:
        points = zip(np.interp(xs, xlim, (left, right)), np.interp(ys, ylim, (bottom, top)))
        points = [point for point in points if np.isfinite(point).all()]
        if width and len(points) > 1:
            draw.line(points, colour, 2 * width, joint="curve")
        else:
            for x, y in points:
                draw.ellipse((x - 8, y - 8, x + 8, y + 8), colour, "white", 2)
        for x, y in points[-1:]:
            draw.text((x + 6, y), name, "dimgray", font, "lm")
    draw.text((left + 8, top - 14), labels[0], "black", font, "ls")
    draw.text(((left + right) / 2, bottom + 70), labels[1], "dimgray", font, "ms")
    draw.text((left - 12, top - 14), labels[2], "dimgray", font, "rs")
    return np.asarray(panel)


def draw_experts(path, epochs, tasks, shared):
    """Draw Fig. 4: the mean gate of each expert in each layer, task by task, at the first, third and last
    epoch. Epochs: (number, gates (L, T, N), the shared experts first). Without experts nothing is drawn."""
    gates = {number: np.nan_to_num(np.array(values, float), posinf=0) for number, values in epochs}
    shown = [number for i, number in enumerate(gates) if i in (0, 2, len(gates) - 1)]
    if not shown or gates[shown[0]].size == 0:
        return
    layers, _, experts = gates[shown[0]].shape
    high = max(gates[number].max() for number in shown) or 1
    size = (experts * max(5, 288 // experts), layers * max(9, 96 // layers))
    edge, top = shared + 0.5, layers + 0.5
    around = ([0.5, edge, edge, 0.5, 0.5], [0.5, 0.5, top, top, 0.5], ORANGE, 2, "")
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


def limits(values, low=0, high=100):
    """The percentiles `low` and `high` of the finite ones among the values, 0 and 1 where there is none."""
    values = np.array(values, float)
    values = values[np.isfinite(values)]
    return np.percentile(values, (low, high)) if values.size else (0, 1)


def draw_curves(path, records, shared=0, topk=0):
    """Draw each task's losses, the learning rate and, where there are `shared` experts, their share of the
    gates, from the records of log.jsonl. Without steps nothing is drawn."""
    steps, epochs = [{r["step"]: r for r in records if r["kind"] == kind} for kind in ("step", "epoch")]
    if not steps:
        return
    x, tasks = list(steps), list(next(iter(steps.values()))["losses"])
    window = np.ones(1 + len(x) // 20)
    axes = dict(size=(330, 190), xlim=(0, x[-1]))
    panels = []
    for task in tasks:
        train = np.array([record["losses"][task] for record in steps.values()], float)
        val = np.array([record["val"][task] for record in epochs.values()], float)
        mean = np.convolve(train, window, "same") / np.convolve(np.ones(len(x)), window, "same")
        lines = [(x, train, PALE, 1, ""), (x, mean, BLUE, 2, ""), (list(epochs), val, ORANGE, 0, "")]
        ylim = limits(np.concatenate([train, val]), 0, 99)
        panels.append(plot(ylim=ylim, labels=(task, "step", "loss"), series=lines, **axes))
    rate = [record["lr"] for record in steps.values()]
    lines = [(x, rate, BLUE, 2, "")]
    panels.append(plot(ylim=(0, limits(rate)[1]), labels=("learning rate", "step", ""), series=lines, **axes))
    legend = [("training loss, each log record", PALE),
              ("its running mean", BLUE), ("validation loss", ORANGE)]
    if shared and epochs:
        gates = np.array([record["gates"] for record in epochs.values()], float)         # (epochs, L, T, N)
        shares = gates[..., :shared].sum(-1).mean(1).T                                   # (T, epochs)
        neutral = shared / (shared + topk)  # what they have where all logits are equal
        lines = [((0, x[-1]), (neutral, neutral), GREY, 2, "")]
        colours = [tuple(colour) for colour in data.PALETTE[1:1 + len(tasks)].tolist()]
        lines += [(list(epochs), share, colour, 2, "") for share, colour in zip(shares, colours)]
        ylim = 0, 1.1 * max(neutral, limits(shares)[1])
        panels.append(plot(ylim=ylim, labels=("gates of the shared experts", "step", "sum"), series=lines,
                           **axes))
        legend += [("shared experts:", None), (f"all logits equal: {shared}/{shared + topk}", GREY)]
        legend += zip(tasks, colours)
    rows = [panels[i:i + 3] for i in range(0, len(panels), 3)]
    sheet(rows, legend=legend, cell=panels[0].shape[1] // 2, frame="white", path=path)


def opposed(cosines):
    """Of the pairs of tasks in a matrix (T, T): the share with a negative cosine, and the mean cosine. Tasks
    that had no gradient, whose cosines are 0, are left out."""
    known = np.diag(cosines) > 0
    cosines = np.array(cosines)[known][:, known]
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    return float((pairs < 0).mean()), float(pairs.mean())


def draw_conflicts(path, epochs, tasks):
    """Draw the cosines of the tasks' gradients at the first, third and last epoch, red where negative, for
    each part of the model. Epochs: (number, {part: (T, T)}). Of none, or one task, nothing is drawn."""
    cosines = dict(epochs)
    shown = [number for i, number in enumerate(cosines) if i in (0, 2, len(cosines) - 1)]
    if not shown or len(tasks) < 2:
        return
    parts, ends = list(cosines[shown[0]]), (0.5, len(tasks) + 0.5)
    ticks = range(len(tasks), 0, -1)
    axes = dict(size=(200, 200), xlim=ends, ylim=ends, xticks=ticks, yticks=ticks)

    def tint(values):
        strength = np.sqrt(np.abs(values))[..., None]  # as in `shade`, small ones show
        ink = np.where(values[..., None] < 0, (200, 30, 30), BLUE)
        return (255 - strength * (255 - ink)).astype(np.uint8)

    def panel(matrix):
        share, mean = opposed(matrix)
        labels = f"{share:.0%} negative, mean {mean:.2f}", "", ""
        return plot(heat=tint(np.clip(matrix[::-1], -1, 1)), labels=labels, **axes)

    rows = [[panel(cosines[number][part]) for number in shown] for part in parts]
    legend = [("tasks", None), *((f"{n} {task}", "white") for n, task in enumerate(tasks, 1))]
    legend += [("cosine", None)]
    legend += [(f"{x:+g}", tuple(tint(np.array(x)).tolist())) for x in (-1, -0.1, 0.1, 1)]
    titles = [f"epoch {number}" for number in shown]
    sheet(rows, titles, legend, labels=parts, cell=rows[0][0].shape[1] // 2, frame="white", path=path)


def draw_edges(path, counts, thresholds):
    """Draw precision against recall of the edges from counts (K, 3), the split's pixels matched, predicted
    and true at each of K thresholds, and the best F. Without true pixels nothing is drawn."""
    matched, predicted, truth = np.asarray(counts, float).T
    if not truth.any():
        return
    precision, recall = matched / np.where(predicted, predicted, np.nan), matched / truth
    f = 2 * matched / (predicted + truth)  # = 2PR / (P + R)
    best = f.argmax()
    series = []
    for level in np.arange(2, 10) / 10:  # the lines of equal F
        r = np.linspace(level / (2 - level), 1, 100)
        series.append((r, level * r / (2 * r - level), GREY, 1, f"{level}"))
    series += [(recall, precision, BLUE, 2, ""), (recall[[best]], precision[[best]], ORANGE, 0, "")]
    title = (f"odsF {100 * f[best]:.1f} at t = {thresholds[best]:.3g} "
             f"(P {100 * precision[best]:.1f}, R {100 * recall[best]:.1f})")
    panel = plot((420, 420), (0, 1), (0, 1), (title, "recall", "precision"), series)
    legend = [(f"{len(f)} thresholds", BLUE), ("best F", ORANGE), ("equal F, as at the right", GREY)]
    sheet([[panel]], legend=legend, cell=max(panel.shape) // 2, frame="white", path=path)


def draw_study(path, groups):
    """Draw Δm of each group of runs, mean ± standard error, and their shared experts' gates over epochs."""
    gains = {name: [row.result["delta_m"] for row in group] for name, group in groups.items()}
    gains = {name: values for name, values in gains.items() if None not in values}
    panels, legend = [], []
    if gains:
        series, ticks = [], {}
        for y, (name, values) in zip(range(len(gains), 0, -1), gains.items()):
            ticks[y], mean = f"{name} ({len(values)})", np.mean(values)
            series.append(((0, mean), (y, y), PALE, 9, ""))
            if len(values) > 1:
                error = standard_error(values)
                series.append(((mean - error, mean + error), (y, y), BLUE, 2, ""))
        ends = [x for xs, *_ in series for x in xs]
        panels.append(plot((330, 26 * len(gains)), (min(ends), max(ends)), (0.4, len(gains) + 0.6),
                           ("gain over the baseline (runs): mean ± standard error", "%", ""),
                           series, yticks=ticks))
    lines = []
    for name, group in groups.items():
        c, epochs = group[0].config, [epoch["epoch"] for epoch in group[0].epochs]
        masses = [[epoch["shared_mass"] for epoch in row.epochs] for row in group
                  if [epoch["epoch"] for epoch in row.epochs] == epochs]  # no record is lacking
        if c.experts and c.shared and c.gating == "joint" and epochs and None not in itertools.chain(*masses):
            colour = tuple(data.PALETTE[1 + len(legend)].tolist())
            neutral = c.shared / (c.shared + c.topk)  # as in `draw_curves`
            lines += [(epochs, len(epochs) * [neutral], GREY, 2, ""),
                      (epochs, np.mean(masses, 0), colour, 2, "")]
            legend.append((name, colour))
    if lines:
        legend.append(("all logits equal", GREY))
        epochs, masses = ([x for line in lines for x in line[n]] for n in (0, 1))
        panels.append(plot((330, 260), (min(epochs), max(epochs)), (0, 1.1 * max(masses)),
                           ("gates of the shared experts", "epoch", "sum"), lines,
                           xticks=range(max(epochs), min(epochs) - 1, -(1 + max(epochs) // 9))))
    if panels:
        cell = max(panel.shape[1] for panel in panels) // 2
        sheet([[panel] for panel in panels], legend=legend, cell=cell, frame="white", path=path)


PICTURES = ("predictions", "experts", "curves", "edges", "conflicts")


def draw_run(run, result, model, dataset, device):
    """All pictures of a run, into its folder; those that depend on the protocol are named like its file."""
    protocol = result["file"].removeprefix("metrics").removesuffix(".json")
    spread = dataset.ids[::max(1, len(dataset) // 40)][:40]
    images = [read_truth(dataset.root, id, list(run.config.tasks)) for id in spread]

    def without_truth(image):
        return sum(not (x.any() if x.ndim == 3 else (x != IGNORE).any()) for x in image[1].values())

    samples = []
    for image, truth in sorted(images, key=without_truth)[:6]:  # with people, where there are any
        activated = predict(model, image, run.settings["mean_std"], device)
        samples.append((image.transpose(1, 2, 0), truth, to_native(activated, image.shape[1:])))
    draw_predictions(run.folder / f"predictions{protocol}.png", samples)
    if "edge" in result:
        edge = result["edge"]
        draw_edges(run.folder / f"edges{protocol}.png", edge["counts"], edge["thresholds"])
    config, records = run.config, read_log(run.folder)
    try:
        epochs = [(r["epoch"], r["gates"]) for r in records if r["kind"] == "epoch"]
        draw_experts(run.folder / "experts.png", epochs, run.settings["tasks"].split(","), config.shared)
        joint = config.experts and config.gating == "joint"
        draw_curves(run.folder / "curves.png", records, config.shared if joint else 0, config.topk)
        cosines = [(r["epoch"], r["conflict"]) for r in records if r.get("conflict")]
        draw_conflicts(run.folder / "conflicts.png", cosines, run.settings["tasks"].split(","))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        print(f"{run.folder}/log.jsonl is not as train.py writes it ({type(error).__name__}: {error}): "
              "experts.png, curves.png or conflicts.png is left out")


def draw_photo(run, path, model, device):
    """A photo's predictions as one picture, run/NAME.png: turned as EXIF says, transparency on white."""
    out = run.folder / f"{path.stem}.png"
    if out.exists() and (out.samefile(path) or path.stem.split("-")[0] in PICTURES):
        raise UserError(f"the predictions would replace {out}: rename {path}")
    with data.reading(path, "expected a photo that Pillow opens"):
        photo = data.eight_bits(ImageOps.exif_transpose(Image.open(path)))
        if photo.has_transparency_data:
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo.convert("RGBA"))
        photo.thumbnail((2048, 2048))
        image = np.array(photo.convert("RGB")).transpose(2, 0, 1)
    activated = predict(model, image, run.settings["mean_std"], device)
    draw_predictions(out, [(image.transpose(1, 2, 0), None, to_native(activated, image.shape[1:]))])
    print(f"drawn: {out}")


if __name__ == "__main__":
    sys.exit(main())
