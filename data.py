"""The five tasks, PASCAL-Context on disk, and batches on the device.

    python data.py DIR               check a data set, say what is missing, draw ./contact_NAME.png
    python data.py demo              the same for the demo, which is rendered first if it isn't there
    python data.py DIR --make N M    render a demo of N training and M validation images into DIR

An image of a data set is a stack of planes of bytes at the image's own size: the photo and the maps that the
tasks are made from (`MAPS`). It is what the files hold and what goes to the device. There one affine grid
warps all planes at once and `targets` derives the tasks from them: edges are drawn in the warped LabelMap (a
resized map of edges would lose half of them), which also tells where normals are valid.

Layout and class lists: PASCAL-Context (Mottaghi et al. 2014) with the parts of Chen et al. 2014 and the
saliency and normals distilled by Maninis et al. 2019 (ASTMT), as multi-task papers use it since.

Shapes: B images · S side of the network's input · H, W an image's own height and width.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

IGNORE = 255  # in every map of classes and in the binary ones: no ground truth here


class Task(NamedTuple):
    channels: int          # of the prediction
    weight: float          # of its loss among the others' (Vandenhende et al. 2021)
    loss: str              # a name in evaluate.LOSSES
    metric: str            # a name in evaluate.METRICS
    lower_is_better: bool
    title: str             # of the metric, with its unit
    maps: tuple = ()       # names in MAPS: the files that its truth is made from
    classes: tuple = ()


VOC_CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
               "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
               "train", "tvmonitor")
PART_CLASSES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")

TASKS = {
    "semseg": Task(21, 1, "cross_entropy", "miou", False, "mIoU %", ("semseg",), VOC_CLASSES),
    "human_parts": Task(7, 2, "cross_entropy", "miou", False, "mIoU %", ("human_parts",), PART_CLASSES),
    "sal": Task(1, 5, "balanced_bce", "max_iou", False, "maxIoU %", ("sal",)),
    "edge": Task(1, 50, "edge_bce", "odsf", False, "odsF %", ("labelmap",)),
    "normals": Task(3, 10, "normals_l1", "angle", True, "mErr °", ("normals", "labelmap")),
}
LISTS = "ImageSets/Context/{}.txt"  # the ids of a split, train or val
DEMO = {"train": 1200, "val": 300, "size": 160}  # the demo made unasked: images, and their longest side

# ------------------------------------------------------------------------------------------- the maps on disk

# context classes whose surface normals are valid
VALID_NORMALS = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53,
    55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113,
    115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193,
    195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250,
    251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293,
    295, 304, 307, 309, 310, 314, 315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357,
    368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421,
    423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457)
CONTEXT_CLASSES = 459

PART_OF = {name: index for index, names in enumerate((
    "hair head lear rear lebrow rebrow leye reye mouth nose", "neck torso", "luarm ruarm",
    "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot"), 1) for name in names.split()}


def read_image(path, size=None, mode="RGB", resample=Image.BILINEAR):
    """An image file of 8 bits a channel as (planes, H, W), resized to (W, H) where that is given."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"it has the mode {image.mode}: expected 8 bits a channel")
        image = image.convert(mode)
        array = np.array(image.resize(size, resample) if size else image)                # (H, W) or (H, W, 3)
    return array.transpose(2, 0, 1) if mode == "RGB" else array[None]


def decode_saliency(path, size):  # like that of normals the file may have a size of its own
    return read_image(path, size, "L", Image.NEAREST) > 127                              # (1, H, W)


def decode_semseg(path, size):
    classes = np.asarray(Image.open(path))  # of a palettised PNG its indices, not its colours
    return whole_numbers(classes, TASKS["semseg"].channels - 1, IGNORE)[None]            # (1, H, W)


def decode_parts(path, size):
    """Positions, not field names, are what the .mat files agree on: object = (name, class, mask, parts)."""
    parts = np.zeros(size[::-1], np.uint8)
    for thing in scipy.io.loadmat(path)["anno"][0][0][1].ravel():
        if int(thing[1].item()) == VOC_CLASSES.index("person"):
            for part in thing[3].ravel():                                                # (name, mask)
                parts[part[1] > 0] = PART_OF[part[0].item()]
    return parts[None]                                                                   # (1, H, W)


def decode_labelmap(path, size):
    labels = whole_numbers(scipy.io.loadmat(path)["LabelMap"], CONTEXT_CLASSES)
    return np.stack([labels & 255, labels >> 8])                                         # (2, H, W)


def whole_numbers(values, most, other=0):
    """The values as int32. Raises ValueError for one that is no whole number, 0 to `most`, nor `other`."""
    good = (values % 1 == 0) & (values >= 0) & (values <= most) | (values == other)
    if not good.all():
        raise ValueError(f"it holds the value {values[~good][0]}: expected 0 to {most}, or {other}")
    return values.astype(np.int32)


class Map(NamedTuple):
    planes: int            # bytes of a pixel
    files: tuple           # where it may be; the first that exists is used
    decode: Callable       # (path, (W, H)) → (planes, H, W)


# The order is that of the planes in memory.
MAPS = {
    "image": Map(3, ("JPEGImages/{}.jpg",), read_image),
    "normals": Map(3, ("normals_distill/{}.png",), read_image),
    "sal": Map(1, ("sal_distill/{}.png",), decode_saliency),
    "semseg": Map(1, ("semseg/VOC12/{}.png", "semseg/pascal-context/{}.png"), decode_semseg),
    "human_parts": Map(1, ("human_parts/{}.mat",), decode_parts),
    "labelmap": Map(2, ("pascal-context/trainval/{}.mat",), decode_labelmap),
}


def maps_of(tasks):
    """The names of the maps that these tasks need, in the order of their planes: the image first."""
    needed = {"image"}.union(*(TASKS[task].maps for task in tasks))
    return tuple(name for name in MAPS if name in needed)


def pick(planes, name, maps):
    """The planes of the map `name`. planes (..., all of `maps`, H, W) → (..., of this one, H, W)."""
    start = sum(MAPS[other].planes for other in maps[:maps.index(name)])
    return planes[..., start:start + MAPS[name].planes, :, :]


def find(root, name, id):
    """The path of the map `name` of image `id`: the first of its places where there is a file, or None."""
    paths = (Path(root) / place.format(id) for place in MAPS[name].files)
    return next((path for path in paths if path.is_file()), None)


def read_map(root, name, id, size):
    """The map `name` of image `id` from its file, (planes, H, W) bytes.

    size (W, H) is the image's; for the image itself None. Raises UserError, which names the file, where it is
    missing, cannot be read, or has the wrong size or values.
    """
    path = find(root, name, id)
    if path is None:
        raise UserError(f"{root} has no {' or '.join(MAPS[name].files).format(id, id)}: "
                        f"`python data.py {root}` tells what is missing")
    with reading(path):
        planes = MAPS[name].decode(path, size).astype(np.uint8)
        if size and planes.shape[1:] != size[::-1]:
            raise ValueError(f"its shape is {planes.shape[1:]}, its image's {size[::-1]}")
    return planes


def read_planes(root, id, maps, image=None):
    """These maps of image `id` from their files (`image`, (3, H, W), where given): (planes, H, W) bytes."""
    image = read_map(root, "image", id, None) if image is None else image
    size = image.shape[:0:-1]
    return np.concatenate([image, *(read_map(root, name, id, size) for name in maps[1:])])


# ------------------------------------------------------------------------------------------- the ground truth


def boundaries(labels):
    """Edges as training has them: the pixels where the 4-neighbour Laplacian of the labels, mirrored at the
    border, is not zero.

    (B, H, W) → bool. Lines are one or two pixels wide, and `thin` makes them one; where the differences to
    the neighbours cancel there is none.
    """
    x = F.pad(labels[:, None].float(), (1, 1, 1, 1), mode="reflect")[:, 0]  # exact: ids are small
    return 4 * x[:, 1:-1, 1:-1] != x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]


def removable(e, ne, n, nw, w, sw, s, se):
    """Guo and Hall's conditions to take a pixel away, from 8 neighbours (east, north-east …), bitwise.

    So for the first of two half-passes; the second sees the ring turned by half: w, sw, s, se, e, ne, n, nw.
    """
    a1, a2, a3, a4 = e | ne, n | nw, w | sw, s | se
    b1, b2, b3, b4 = ne | n, nw | w, sw | s, se | e
    # X = 1: the neighbours form one piece, so that nothing is torn (an odd number of pieces, and not three)
    x1, x2, x3, x4 = b1 & ~e, b2 & ~n, b3 & ~w, b4 & ~s
    one = (x1 ^ x2 ^ x3 ^ x4) & ~(x1 & x2 | x3 & x4)
    # 2 <= min(sum a, sum b) <= 3: neither the end of a line nor a pit
    a12, a34, b12, b34 = a1 & a2, a3 & a4, b1 & b2, b3 & b4
    two = (a12 | a34 | (a1 | a2) & (a3 | a4)) & (b12 | b34 | (b1 | b2) & (b3 | b4))
    four = a12 & a34 & b12 & b34
    # from one side only: a line two pixels wide must not vanish at once
    return one & two & ~four & ~((b1 | ~se) & e)


def thin(x, passes=None):
    """Thin lines to one pixel: Guo and Hall's way (Lam, Lee and Suen 1992), Matlab's bwmorph(…, 'thin').

    x: (..., H, W), numpy or torch: bool, or integers that are thinned bit by bit, each bit a map of its own.
    Outside of the image is background. `passes=None` goes on until nothing changes; a number makes that many
    passes and never waits for the device (two are enough for what `boundaries` finds, but for odd corners).
    """
    if torch.is_tensor(x):
        p = F.pad(x, (1, 1, 1, 1))
    else:
        p = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)])
    h, w = x.shape[-2:]
    corners = ((1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2))  # E NE N NW W SW S SE
    ring = [p[..., i : i + h, j : j + w] for i, j in corners]  # views: they follow p
    inside = p[..., 1:-1, 1:-1]
    for _ in range(passes or 10**9):
        first = inside & removable(*ring)
        inside ^= first
        second = inside & removable(*ring[4:], *ring[:4])
        inside ^= second
        if passes is None and not (first | second).any():
            break
    return inside


def unit(x, dim=1):
    """Vectors along `dim` at length 1, zero stays zero: F.normalize, which is 12 times as slow on a CPU."""
    return x * (x.square().sum(dim, keepdim=True) + 1e-24).rsqrt()


def targets(planes, tasks=TASKS, inside=None, edges=lambda labels: thin(boundaries(labels))):
    """The ground truth of these tasks from the planes of their maps, at their size, on their device.

    planes (B, planes of `maps_of(tasks)`, H, W) uint8 · inside (B, H, W) bool: where there is ground truth at
    all · edges: those of LabelMaps (B, H, W) int16. Returns {task: int64 (B, H, W), where IGNORE marks no
    ground truth; normals: float (B, 3, H, W), there zero}.
    """
    maps = maps_of(tasks)
    if inside is None:
        inside = torch.ones_like(planes[:, 0], dtype=torch.bool)
    if "labelmap" in maps:
        low, high = pick(planes, "labelmap", maps).short().unbind(1)
        labels = low + 256 * high                                                        # (B, H, W)
    truth = {}
    for task in tasks:
        if task == "normals":
            known = torch.zeros(CONTEXT_CLASSES + 1, dtype=torch.bool)
            known[list(VALID_NORMALS)] = True  # a table takes a quarter of the time of torch.isin
            valid = inside & known.to(labels.device, non_blocking=True)[labels.int()]
            normals = pick(planes, "normals", maps) / 127.5 - 1
            valid &= normals.square().sum(1) > 0.25  # true ones have length 1; grey, 127 or 128, is no truth
            truth[task] = unit(normals) * valid[:, None]
            continue
        if task == "edge":
            classes = edges(labels).long()
        else:  # the truth is the map
            classes = pick(planes, task, maps)[:, 0].long()
        truth[task] = classes.masked_fill(~inside, IGNORE)
        if task == "human_parts":  # an image without people says nothing about parts
            people = (truth[task] % IGNORE > 0).flatten(1).any(1)                        # (B,)
            truth[task] = truth[task].masked_fill(~people[:, None, None], IGNORE)
    return truth


# --------------------------------------------------------------------------------------- a split, and batches


class Batch(NamedTuple):
    images: torch.Tensor  # (B, 3, S, S) float, normalised as the weights want it
    targets: dict         # as `targets` returns them, (B, S, S) or (B, 3, S, S)


MEAN_STD = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3)}


def normalise(images, mean_std):
    """images (B, 3, H, W), 0 to 255 → what a backbone pretrained with `mean_std` expects."""
    mean, std = torch.tensor(MEAN_STD[mean_std]).to(images.device, non_blocking=True)[..., None, None]
    return (images / 255 - mean) / std


def read_list(path):
    """The words of a text file, with or without a byte-order mark and Windows' line ends."""
    content = Path(path).read_bytes()
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").split()


def read_ids(root, split):
    """The ids of a split, in the order of its list. Raises UserError for a list that cannot be trusted."""
    path = Path(root) / LISTS.format(split)
    if not path.is_file():
        raise UserError(f"there is no {path}: expected a folder in PASCAL-Context's layout, or the word demo")
    with reading(path, "expected one image id a line, each once"):
        ids = read_list(path)
        strange = [id for id, times in collections.Counter(ids).items()
                   if times > 1 or not re.fullmatch(r"\w[\w.-]*", id)]
        if strange or not ids:
            raise ValueError(f"it lists {[*strange, 'nothing'][0]}")
    return ids


def fingerprint(root):
    """What tells a data set from others, wherever it lies: a hash of its two lists and of its demo.json."""
    paths = [Path(root) / file for file in (LISTS.format("train"), LISTS.format("val"), "demo.json")]
    content = [path.read_bytes() for path in paths if path.is_file()]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]


class PascalContext:
    """One split of a data set in PASCAL-Context's layout, with the maps that `tasks` need.

    `dataset[i]` is (image (3, H, W) uint8, {task: target}) at native size; `dataset.canvases` is what `warp`
    makes batches of. Files are read where they lie, each time anew.
    """

    def __init__(self, root, split, size, tasks=TASKS):
        self.root = Path(root)
        self.ids = read_ids(root, split)
        self.size = size  # S
        self.tasks, self.maps = tuple(tasks), maps_of(tasks)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        planes = torch.from_numpy(read_planes(self.root, self.ids[i], self.maps))
        truth = targets(planes[None], self.tasks)
        return pick(planes, "image", self.maps), {task: x[0] for task, x in truth.items()}

    def require_files(self):
        """Raises UserError for the first file that these tasks need and that is missing."""
        for id in self.ids:
            for name in self.maps:
                if find(self.root, name, id) is None:
                    read_map(self.root, name, id, None)  # raises

    def canvas(self, indices):
        """Images of any sizes in one array, (B, planes, H, W) bytes, and their own (H, W), (B, 2).

        A file that cannot be read comes back as its UserError: `DataLoader` would bury what a worker raises.
        Arrays, since tensors would go through /dev/shm, of which a container may have 64 MB.
        """
        try:
            images = [read_planes(self.root, self.ids[i], self.maps) for i in indices]
        except UserError as error:
            return error
        sizes = np.array([image.shape[1:] for image in images])
        canvas = np.zeros((len(images), len(images[0]), *sizes.max(0)), np.uint8)
        for place, image in zip(canvas, images):
            place[:, :image.shape[1], :image.shape[2]] = image
        return canvas, sizes

    def canvases(self, plan, device, workers=0):
        """`canvas` of each list of indices in `plan`, on the device; `workers` processes read ahead."""
        loader = DataLoader(range(len(self)), batch_sampler=plan, collate_fn=self.canvas, num_workers=workers,
                            worker_init_fn=start_worker)
        for found in loader:
            if isinstance(found, UserError):
                raise found
            tensors = [torch.from_numpy(x) for x in found]
            if device.type == "cuda":  # only from pinned memory the copy goes on beside the computation
                tensors = [x.pin_memory() for x in tensors]
            yield [x.to(device, non_blocking=True) for x in tensors]


def random_warps(number, generator):
    """Flip (p = 0.5), rotation U(−20°, 20°), scale U(0.75, 1.25): matrices for `warp`, (number, 2, 2)."""
    flip, angle, scale = torch.rand(3, number, generator=generator)
    angle = math.radians(20) * (2 * angle - 1)
    cos, sin = angle.cos(), angle.sin()
    rotate = torch.stack([cos, sin, -sin, cos], -1).view(-1, 2, 2)
    mirror = torch.diag_embed(torch.stack([1 - 2 * (flip < 0.5).float(), torch.ones(number)], -1))
    return mirror @ rotate / (0.75 + 0.5 * scale).view(-1, 1, 1)


def warp(canvas, sizes, side, mean_std, tasks=TASKS, target_to_source=None):
    """The network's input and its targets: one affine grid about the centre of each image for all maps.

    Two frames: the source, an image as it was read, and the target, S×S, which the network sees. Each target
    pixel looks up the source point that it shows: its offset from the centre, in source pixels, is turned by
    the matrix, and half a size added, so that it counts from the source's corner.

    canvas (B, planes, H, W) and sizes (B, 2) of `PascalContext.canvas` · target_to_source (B, 2, 2): matrices
    for offsets (x, y); None: the identity. → `Batch`, S = side.
    """
    if target_to_source is None:
        target_to_source = torch.eye(2).expand(len(canvas), 2, 2)
    rotation = target_to_source / target_to_source.det().abs().sqrt()[:, None, None]  # or mirrored rotation
    target_to_source = target_to_source.to(canvas.device, non_blocking=True)
    rotation = rotation.to(canvas.device, non_blocking=True)
    size = sizes.flip(1)[:, None, None].float()  # (B, 1, 1, 2) width, height
    steps = (torch.arange(side, device=canvas.device) + 0.5) / side - 0.5
    target = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)                # (S, S, 2) x, y
    source = target * size @ target_to_source.mT[:, None] + size / 2  # (B, S, S, 2) in pixels
    inside = ((source >= 0) & (source < size)).all(-1)                                   # (B, S, S)
    # nearest for what must not be mixed; beyond the border its last pixel goes on: no edge arises there
    x, y = source.floor().clamp(min=0).minimum(size - 1).long().unbind(-1)
    nearest = (y * canvas.shape[3] + x).flatten(1)[:, None]                              # (B, 1, S·S)
    planes = canvas.flatten(2).gather(2, nearest.expand(-1, canvas.shape[1], -1)).unflatten(2, (side, side))
    # two passes thin a boundary two pixels wide, and no device need wait
    truth = targets(planes, tasks, inside, lambda labels: thin(boundaries(labels), passes=2))
    if "normals" in truth:  # they turn with their image: by the transposed matrix
        truth["normals"][:, :2] = torch.einsum("bji,bjyx->biyx", rotation, truth["normals"][:, :2])
    extent = torch.tensor(canvas.shape[:1:-1]).to(canvas.device, non_blocking=True)
    grid = 2 * source.clamp(min=0.5).minimum(size - 0.5) / extent - 1  # as grid_sample has it, -1 … 1
    images = F.grid_sample(pick(canvas, "image", maps_of(tasks)).float(), grid, align_corners=False)
    return Batch(normalise(images, mean_std), truth)


# -------------------------------------------------------------------------------------------------- the check


def _examine(job):
    """One image: {map: what is wrong with it, "" where it is missing}, whether people have parts in it, and
    anything is salient, the sum of channel 1 over its floor's normals, and how many these are."""
    root, id = job
    faults, planes, floor = {}, {}, np.zeros(0)
    for name in MAPS:
        if find(root, name, id) is None:
            faults[name] = ""
        elif name == "image" or "image" in planes:  # of an image without a size nothing else can be read
            try:
                planes[name] = read_map(root, name, id, planes["image"].shape[:0:-1] if planes else None)
            except UserError as error:
                faults[name] = str(error)
    if {"labelmap", "normals"} <= planes.keys():
        low, high = planes["labelmap"].astype(int)
        floor = planes["normals"][1][low + 256 * high == 158] / 127.5 - 1  # 158: floor
    shown = [planes[name].any() if name in planes else False for name in ("human_parts", "sal")]
    return faults, *shown, floor.sum(), floor.size


def check(root):
    """Print what the data set holds and lacks; return the tasks that it could train."""
    print(f"{'split':6}{'map':12}{'expected':>12}{'there':>12}{'unreadable':>12}")
    faulty = set()  # maps
    for split in ("train", "val"):
        ids = read_ids(root, split)
        jobs = [(root, id) for id in ids]
        faults, people, salient, floor, pixels = zip(*parallel(_examine, jobs, len(jobs), f"check {split}"))
        for name in MAPS:
            missing = [id for id, found in zip(ids, faults) if found.get(name) == ""]
            unreadable = [found[name] for found in faults if found.get(name)]
            print(f"{split:6}{name:12}{len(ids):12}{len(ids) - len(missing):12}{len(unreadable):12}")
            if missing or unreadable:
                faulty.add(name)
                places = " or ".join(MAPS[name].files).replace("{}", (missing or [""])[0])
                print("  " + (unreadable or [f"missing: {places}"])[0])
        print(f"  {np.mean(people):.0%} of the images have human parts, {np.mean(salient):.0%} saliency"
              + ("" if any(salient) else ": NOTHING IS SALIENT, expected values above half of full scale"))
        if sum(pixels):
            mean = sum(floor) / sum(pixels)
            sign = "as expected" if mean < 0 else "UPSIDE DOWN: floors should look up; negate it in `targets`"
            print(f"  floor normals: mean of channel 1 is {mean:+.2f}, {sign}")
    return [task for task in TASKS if not faulty & {*maps_of([task])}]


def draw_contact(root, tasks, path):
    """8 training images, spread over the list, with the targets of `tasks`."""
    dataset, rows = PascalContext(root, "train", None, tasks), []
    for i in range(0, len(dataset), -(-len(dataset) // 8)):
        image, truth = dataset[i]
        painted = [paint(TASKS[task], x.numpy()) for task, x in truth.items()]
        rows.append([image.permute(1, 2, 0).numpy(), *painted])
    sheet(rows, ["image", *tasks], path=path)


# --------------------------------------------------------------------------------------------------- pictures

# PASCAL VOC's colours: bits 0, 3, 6 of a class number are the high bits of red, 1, 4, 7 of green, 2, 5 of
# blue, highest first. What is ignored is light grey here, in every task.
PALETTE = np.zeros((256, 3), np.uint8)
for bit in range(8):
    PALETTE[:, bit % 3] |= (np.arange(256, dtype=np.uint8) >> bit & 1) << (7 - bit // 3)
PALETTE[255] = 224


def paint(task, array):
    """Colours (H, W, 3) uint8 of one map. Classes: (H, W) integers, 255 = ignored. One channel: (H, W), white
    to black from 0 to 1 (or the maximum), 255 = ignored. Vectors: (3, H, W), (n + 1) / 2, zero = ignored."""
    array = np.asarray(array)
    if task.classes:
        return PALETTE[array]
    if task.channels == 1:
        ignored = array == 255
        light = 1 - array[..., None] / max(1, array.max(where=~ignored, initial=0))  # (H, W, 1)
    else:
        ignored = ~array.any(axis=0)
        light = (array.transpose(1, 2, 0) + 1) / 2  # (H, W, 3)
    return np.where(ignored[..., None], PALETTE[255], (255 * light.clip(0, 1)).round()).astype(np.uint8)


def legend_of(task, arrays):
    """What the colours mean: [(name, (red, green, blue)), …]; of classes those that occur in the arrays."""
    if task.classes:
        names = dict(enumerate(task.classes)) | {255: "ignored"}
        used = set().union(*(np.unique(array).tolist() for array in arrays))
        return [(names[i], tuple(PALETTE[i].tolist())) for i in sorted(used)]
    if task.channels == 1:
        return [("0", (255, 255, 255)), ("1", (0, 0, 0))]
    unit = paint(task, np.eye(4)[:3, None])[0]  # the vectors x, y, z and zero
    return list(zip(("+x", "+y", "+z", "ignored"), map(tuple, unit.tolist())))


def sheet(rows, titles=(), legend=(), labels=(), cell=180, frame="silver", path=None):
    """One picture of many: rows of (H, W, 3) uint8 arrays of any size, each fitted into `cell` × `cell`
    pixels; titles above the columns, labels beside the rows; legend below, (name, colour) pairs, where no
    colour (None) makes the name begin a line. Returns the PIL image; saves it when there is a path."""
    gap, line, font = 6, 22, ImageFont.load_default(15)
    left = gap + max((int(font.getlength(label)) + 2 * gap for label in labels), default=0)
    width = left + max(len(row) for row in rows) * (cell + gap)
    canvas = Image.new("RGB", (width, len(rows) * (cell + gap) + (len(legend) + 2) * line), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((left + column * (cell + gap) + cell // 2, line), title, "black", font, "ms")

    y = gap + line * bool(titles)
    for row, label in zip(rows, [*labels, *[""] * len(rows)]):
        pictures = [ImageOps.contain(Image.fromarray(array), (cell, cell), Image.HAMMING) for array in row]
        tall = max(picture.height for picture in pictures)
        draw.text((gap, y + tall // 2), label, "black", font, "lm")
        for column, picture in enumerate(pictures):
            x = left + column * (cell + gap) + (cell - picture.width) // 2
            canvas.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=frame)
        y += tall + gap

    x, y = width, y - line  # the first entry begins a line
    for name, colour in legend:
        wide = int(font.getlength(name)) + 32
        if colour is None or x + wide > width:
            x, y = left, y + line
        if colour is not None:
            draw.rectangle((x, y + 4, x + 13, y + 17), fill=colour, outline="silver")
        draw.text((x if colour is None else x + 19, y + line // 2), name, "black", font, "lm")
        x += wide
    canvas = canvas.crop((0, 0, width, y + line + gap))
    if path:
        write_atomically(path, lambda file: canvas.save(file, "PNG", optimize=True))
    return canvas


# ------------------------------------------------------------------------------------ how the commands behave


class UserError(Exception):
    """Something the user can mend: the commands print it as one line and exit with code 2."""


@contextlib.contextmanager
def reading(path, advice="replace the file by a good copy"):
    """Whatever a reader raises inside becomes one UserError that names the file, the reason, the way out."""
    try:
        yield
    except Exception as error:  # Pillow, scipy and json raise nearly anything on a broken file
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"cannot read {path} ({reason}): {advice}") from None


def write_atomically(path, write):
    """`write(file)` into a temporary file and rename it: `path` is whole or as it was, at any moment."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save makes one of what it meets: Ctrl-C, a full disk
        raise error.__context__ or error from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda file: file.write(json.dumps(value, allow_nan=False).encode()))


def pick_device(name=None):
    """The device that a command runs on. Raises UserError for one that isn't there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).relu().device
    except (RuntimeError, AssertionError):
        raise UserError(f"no device {name} here: expected cpu, or cuda where torch has it") from None


def autocast(device):
    """bfloat16 on a GPU that computes it natively (compute capability 8.0 on), else float32."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def command(parser, job, argv=None):
    """Parse the command line and do the job; what users do get wrong ends in one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where its encoding lacks ↑, Δ, × or °: ?
            stream.reconfigure(errors="replace")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    args = parser.parse_args(argv)
    try:
        return job(args)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; the same command goes on or starts again\n")
    except UserError as error:
        parser.error(str(error))
    except OSError as error:  # a full disk, a folder that cannot be written
        parser.error(f"{error.filename or 'cannot write'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:  # Python's, a GPU's, a killed worker's, a CPU's
        if not re.search("MemoryError|BrokenProcessPool|DataLoader worker|allocate memory", repr(error)):
            raise
        parser.error(f"out of memory ({error}); train.py has --micro-batch, --size and --checkpointing")


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_worker(*_):
    """In a worker: Ctrl-C is for the parent alone, and a parent that is killed takes its workers along."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def _pooled(function, jobs):
    """`function` of every job, in order, by a process a core. Few jobs are ahead: they may hold images."""
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")  # read by those who start now
    # spawned, since a fork would inherit torch's threads half alive
    spawn, futures = multiprocessing.get_context("spawn"), collections.deque()
    with concurrent.futures.ProcessPoolExecutor(cores(), spawn, start_worker) as pool:
        for job in jobs:
            futures.append(pool.submit(function, job))
            if len(futures) > 4 * cores():
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def parallel(function, jobs, total, what):
    """`function` of every job, in order, on all cores where there are many; a terminal shows the progress."""
    start = time.time()
    results = _pooled(function, jobs) if total >= 48 else map(function, jobs)
    for n, result in enumerate(results, 1):
        yield result
        if sys.stderr.isatty():
            left = timedelta(seconds=round((time.time() - start) / n * (total - n)))
            end = "\n" if n == total else ""
            print(f"\r{what:12}{n:6}/{total}   {left} left", end=end, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------- python data.py

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", metavar="DIR", help="a folder in PASCAL-Context's layout, or the word demo")
    parser.add_argument("--make", nargs=2, type=int, metavar=("N", "M"),
                        help="render a demo of N training and M validation images into DIR")
    parser.add_argument("--size", type=int, default=DEMO["size"], help="longest side, pixels (default 160)")
    parser.add_argument("--seed", type=int, default=0, choices=range(50), metavar="K", help="other scenes")
    return command(parser, run, argv)


def run(args):
    root = Path(args.root)
    if args.make or (args.root == "demo" and not root.exists()):
        from assets.demo import make_demo  # which imports this file
        make_demo(root, *(args.make or (DEMO["train"], DEMO["val"])), args.size, args.seed)
    tasks = check(root)
    if tasks:
        path = f"contact_{root.resolve().name}.png"
        draw_contact(root, tasks, path)
        print(f"drawn: {path}")
    print(f"a training could start with --tasks {','.join(tasks)}" if tasks else
          "no training could start: mend what is listed above")
    return int(len(tasks) < len(TASKS))


if __name__ == "__main__":
    from data import main  # as a module: assets.demo imports it, and its UserError is to be ours
    sys.exit(main())
