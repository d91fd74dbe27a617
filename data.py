"""The five tasks, PASCAL-Context on disk, batches on the device, and a demo world in the same layout.

    python data.py DIR               check a data set, say what is missing, draw ./contact_NAME.png
    python data.py demo              the same for the demo, which is rendered first if it isn't there
    python data.py DIR --make N M    render a demo of N training and M validation images into DIR

An image of a data set is a stack of planes of bytes at the image's own size: the photo and the maps that the
tasks are made from (`MAPS`). It is what the files hold, what the cache keeps, and what goes to the device.
There one affine grid warps all planes at once and `targets` derives the tasks from them: edges are drawn in
the warped LabelMap (a resized map of edges would lose half of them), which also tells where normals are
valid.

Layout and class lists: PASCAL-Context (Mottaghi et al. 2014) with the parts of Chen et al. 2014 and the
saliency and normals distilled by Maninis et al. 2019 (ASTMT), as multi-task papers use it since.

Shapes: B images · S side of the network's input · H, W an image's own height and width.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import scipy.io
import scipy.ndimage
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
# the ids of a split, train or val
LISTS = "ImageSets/Context/{}.txt"

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
FLOOR = 158
PERSON = VOC_CLASSES.index("person")

PART_OF = {name: index for index, names in enumerate((
    "hair head lear rear lebrow rebrow leye reye mouth nose", "neck torso", "luarm ruarm",
    "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot"), 1) for name in names.split()}


def read_image(path, mode, size=None, resample=None):
    with Image.open(path) as image:
        image = eight_bits(image).convert(mode)
        return np.array(image.resize(size, resample) if size else image)                 # (H, W) or (H, W, 3)


def decode_image(path, size):
    return read_image(path, "RGB").transpose(2, 0, 1)                                    # (3, H, W)


def decode_normals(path, size):  # the file may have a size of its own
    return read_image(path, "RGB", size, Image.BILINEAR).transpose(2, 0, 1)              # (3, H, W)


def decode_saliency(path, size):  # this one, too
    return read_image(path, "L", size, Image.NEAREST)[None] > 127                        # (1, H, W)


def decode_semseg(path, size):
    with Image.open(path) as image:
        # of a palettised PNG its indices, not its colours
        classes = np.asarray(image)
    if classes.ndim != 2:
        raise Fault("range", "has colours: expected one channel of class numbers")
    return whole_numbers(classes, TASKS["semseg"].channels - 1, IGNORE)[None]            # (1, H, W)


def decode_parts(path, size):
    """Positions, not field names, are what the .mat files agree on: object = (name, class, mask, parts)."""
    parts = np.zeros(size[::-1], np.uint8)
    for thing in scipy.io.loadmat(path)["anno"][0][0][1].ravel():
        if int(thing[1].item()) == PERSON:
            for part in thing[3].ravel():                                                # (name, mask)
                parts[part[1] > 0] = PART_OF[part[0].item()]
    return parts[None]                                                                   # (1, H, W)


def decode_labelmap(path, size):
    labels = whole_numbers(scipy.io.loadmat(path)["LabelMap"], CONTEXT_CLASSES)
    return np.stack([labels & 255, labels >> 8])                                         # (2, H, W)


def eight_bits(image):
    """Pillow's image with 8 bits a channel: 16 are scaled. Raises Fault for other depths."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise Fault("range", f"holds {values.dtype} numbers up to {values.max():g}: expected 8 or "
                                 "16 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))
    return image


def whole_numbers(values, most, other=0):
    """The values as int32. Raises Fault where one is neither a whole number from 0 to `most` nor `other`."""
    if values.dtype.kind not in "buif":
        raise Fault("range", f"holds {values.dtype} numbers: expected whole ones")
    with np.errstate(invalid="ignore"):  # NaN
        good = (values == values.astype(np.int32)) & (values >= 0) & (values <= most) | (values == other)
    if not good.all():
        also = f", or {other}" if other else ""
        raise Fault("range", f"holds the value {values[~good][0]}: expected 0 to {most}{also}")
    return values.astype(np.int32)


class Map(NamedTuple):
    planes: int            # bytes of a pixel
    files: tuple           # where it may be; the first that exists is used
    decode: Callable       # (path, (W, H)) → (planes, H, W)
    resized: bool = False  # a file of another size than the image's is legal


# The order is that of the planes in memory.
MAPS = {
    "image": Map(3, ("JPEGImages/{}.jpg",), decode_image),
    "normals": Map(3, ("normals_distill/{}.png",), decode_normals, True),
    "sal": Map(1, ("sal_distill/{}.png",), decode_saliency, True),
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
    """The path of the map `name` of image `id`. Raises Fault where there is none."""
    paths = [Path(root) / pattern.format(id) for pattern in MAPS[name].files]
    for path in paths:
        if path.is_file():
            return path
    raise Fault("missing", f"{' and '.join(map(str, paths))} missing: "
                           f"`python data.py {root}` lists all that is")


def read_map(root, name, id, size):
    """The map `name` of image `id` from its file, (planes, H, W) bytes.

    size (W, H) is the image's; for the image itself None.
    Raises Fault, which names the file, where it is missing, cannot be read, or has the wrong size or values.
    """
    path = find(root, name, id)
    with reading(path):
        planes = MAPS[name].decode(path, size).astype(np.uint8)
    if size and planes.shape[1:] != size[::-1]:
        raise Fault("size", f"{path} is {planes.shape[2]}×{planes.shape[1]}: expected its image's "
                            f"{size[0]}×{size[1]}")
    return planes


def read_planes(root, id, maps, image=None):
    """These maps of image `id` from their files (`image`, (3, H, W), where given): (planes, H, W) bytes."""
    if image is None:
        image = read_map(root, "image", id, None)
    size = image.shape[:0:-1]
    return np.concatenate([image, *(read_map(root, name, id, size) for name in maps if name != "image")])


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
    done = 0
    while done != passes:
        first = inside & removable(*ring)
        inside ^= first
        second = inside & removable(*ring[4:], *ring[:4])
        inside ^= second
        done += 1
        if passes is None and not (first | second).any():
            break
    return inside


def unit(x, dim=1):
    """Vectors along `dim` at length 1, zero stays zero: F.normalize, which is 12 times as slow on a CPU."""
    return x * (x.square().sum(dim, keepdim=True) + 1e-24).rsqrt()


def labels_of(planes, maps):
    """The LabelMap of planes (B, planes, H, W): (B, H, W) int16."""
    low, high = pick(planes, "labelmap", maps).short().unbind(1)
    return low + 256 * high


def targets(planes, tasks=TASKS, inside=None, passes=None):
    """The ground truth of these tasks from the planes of their maps, at their size, on their device.

    planes (B, planes of `maps_of(tasks)`, H, W) uint8 · inside (B, H, W) bool: where there is ground truth at
    all · passes: see `thin`. Returns {task: int64 (B, H, W), where IGNORE marks no ground truth; normals:
    float (B, 3, H, W), there zero}.
    """
    maps = maps_of(tasks)
    if inside is None:
        inside = torch.ones_like(planes[:, 0], dtype=torch.bool)
    labels = labels_of(planes, maps) if "labelmap" in maps else None
    truth = {}
    for task in tasks:
        if task == "normals":
            known = torch.zeros(CONTEXT_CLASSES + 1, dtype=torch.bool)
            known[list(VALID_NORMALS)] = True
            # a table takes a quarter of the time of torch.isin
            valid = inside & known.to(labels.device, non_blocking=True)[labels.int()]
            truth[task] = unit(pick(planes, "normals", maps) / 127.5 - 1) * valid[:, None]
            continue
        if task == "edge":
            classes = thin(boundaries(labels), passes).long()
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


def locate(root):
    """The folder that holds the data set. Raises UserError, which tells a better path where there is one."""
    root, train = Path(root), LISTS.format("train")
    if not root.is_dir():
        found = f"{root} is a file" if root.exists() else f"no data folder {root}"
        raise UserError(f"{found}: expected a folder in PASCAL-Context's layout, or the word demo")
    if not (root / train).is_file():
        below = [folder for folder in sorted(root.glob("*")) if (folder / train).is_file()]
        hint = f"did you mean {below[0]}?" if below else "expected a folder in PASCAL-Context's layout"
        raise UserError(f"{root} has no {train}: {hint}")
    return root


def read_ids(root, split):
    """The ids of a split, in the order of its list. Raises UserError for a list that cannot be trusted."""
    path = locate(root) / LISTS.format(split)
    with reading(path, "expected one image id a line"):
        ids = path.read_text(encoding="utf-8").split()
    strange = [id for id in ids if not re.fullmatch(r"\w[\w.-]*", id)]
    if strange:
        raise UserError(f"{path} holds the id {strange[0]!r}: expected letters, digits, _ . - and no path")
    if not ids or len(set(ids)) < len(ids):
        found = next((f"lists {id} twice" for id in ids if ids.count(id) > 1), "is empty")
        raise UserError(f"{path} {found}: expected every id once")
    return ids


class PascalContext:
    """One split of a data set in PASCAL-Context's layout, with the maps that `tasks` need.

    `dataset[i]` is (image (3, H, W) uint8, {task: target}) at native size;
    `dataset.canvases` is what `warp` makes batches of. `cache`: the folder that `build_cache` filled.
    """

    def __init__(self, root, split, size, tasks=TASKS, cache=None):
        self.root = locate(root)
        self.ids = read_ids(root, split)
        self.size = size  # S
        self.tasks, self.maps = tuple(tasks), maps_of(tasks)
        self.cache = cache and Path(cache)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        planes = torch.from_numpy(self.planes(i))
        truth = targets(planes[None], self.tasks)
        return pick(planes, "image", self.maps), {task: x[0] for task, x in truth.items()}

    def planes(self, i):
        """The maps of image i: (planes, H, W) bytes."""
        if self.cache is None:
            return read_planes(self.root, self.ids[i], self.maps)
        return np.concatenate([np.load(self.cache / name / f"{self.ids[i]}.npy") for name in self.maps])

    def canvas(self, indices):
        """Images of any sizes in one tensor, (B, planes, H, W) bytes, and their own (H, W), (B, 2)."""
        images = [self.planes(i) for i in indices]
        sizes = np.array([image.shape[1:] for image in images])
        canvas = np.zeros((len(images), len(images[0]), *sizes.max(0)), np.uint8)
        for place, image in zip(canvas, images):
            place[:, :image.shape[1], :image.shape[2]] = image
        return torch.from_numpy(canvas), torch.from_numpy(sizes)

    def canvases(self, plan, device, workers=0):
        """`canvas` of each list of indices in `plan`, on the device; `workers` processes read ahead."""
        loader = DataLoader(range(len(self)), batch_sampler=plan, collate_fn=self.canvas, num_workers=workers,
                            pin_memory=torch.device(device).type == "cuda")
        for canvas in loader:
            yield [x.to(device, non_blocking=True) for x in canvas]


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

    canvas (B, planes, H, W) and sizes (B, 2) of `PascalContext.canvas` · target_to_source (B, 2, 2): takes an
    offset (x, y) from the centre of the warped image, in pixels, into the source; None: the identity.
    → `Batch`, S = side.
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
    truth = targets(planes, tasks, inside, passes=2)
    if "normals" in truth:  # they turn with their image: by the transposed matrix
        truth["normals"][:, :2] = torch.einsum("bji,bjyx->biyx", rotation, truth["normals"][:, :2])
    extent = torch.tensor(canvas.shape[:1:-1]).to(canvas.device, non_blocking=True)
    grid = 2 * source.clamp(min=0.5).minimum(size - 0.5) / extent - 1  # as grid_sample has it, -1 … 1
    images = F.grid_sample(pick(canvas, "image", maps_of(tasks)).float(), grid, align_corners=False)
    return Batch(normalise(images, mean_std), truth)


def cached(path, source, planes):
    """(H, W) of a map that the cache holds whole and as it was made from this source, else None."""
    with contextlib.suppress(OSError, ValueError, EOFError):  # missing, cut, or no array
        array = np.load(path, mmap_mode="r")
        same = abs(path.stat().st_mtime - source.stat().st_mtime) < 2  # seconds: some file systems round
        whole = array.dtype == np.uint8 and array.ndim == 3 and len(array) == planes
        return array.shape[1:] if whole and same else None


def _cache_image(job):
    root, id, maps, folder = job
    image = read_map(root, "image", id, None)
    for name in maps:
        path, made = folder / name / f"{id}.npy", find(root, name, id).stat().st_mtime
        planes = image if name == "image" else read_map(root, name, id, image.shape[:0:-1])
        write_atomically(path, lambda file: np.save(file, planes))
        os.utime(path, (made, made))  # its source's time: another file of that name is noticed


def build_cache(root, ids, tasks=TASKS, cache=None):
    """Parse the files of these images once, on all cores, into one array a map and image; return the folder.

    cache: where that folder lies, else inside the data set. What is there, whole and from the same sources,
    stays: a build that was interrupted goes on, and another task adds its maps. Raises UserError where a file
    is missing or broken, or the folder cannot be written.
    """
    folder, jobs = Path(cache or Path(root) / "cache"), []
    for id in ids:
        held = {name: cached(folder / name / f"{id}.npy", find(root, name, id), MAPS[name].planes)
                for name in maps_of(tasks)}
        stale = [name for name, size in held.items() if size is None or size != held["image"]]
        if stale:
            jobs.append((root, id, stale, folder))
    if jobs:
        print(f"cache      {len(jobs)} images into {folder}", flush=True)
    try:
        for name in maps_of(tasks):
            (folder / name).mkdir(parents=True, exist_ok=True)
            remove_leavings(folder / name)
        for _ in parallel(_cache_image, jobs, "cache"):
            pass
    except OSError as error:
        raise UserError(f"cannot write the cache {folder} ({error.strerror}): make room, or name another "
                        "folder, --cache DIR") from None
    return folder


# -------------------------------------------------------------------------------------------------- the check


def _examine(job):
    """One image: {(map, kind of fault or remark): what was found}, and channel 1 of its floor normals."""
    root, id = job
    found, planes, size, floor = {}, {}, None, np.zeros(0)
    for name in maps_of(TASKS):
        try:
            path = find(root, name, id)
            if size or name == "image":  # without its size the others can only be looked for
                planes[name] = read_map(root, name, id, size)
                size = size or planes["image"].shape[:0:-1]
                if MAPS[name].resized and Image.open(path).size != size:
                    found[name, "remark"] = "of another size than its image (legal: resized)"
        except Fault as fault:
            found[name, fault.kind] = str(fault)
    if "human_parts" in planes and planes["human_parts"].any():
        found["human_parts", "people"] = ""
    if "labelmap" in planes:
        labels = planes["labelmap"][0] + 256 * planes["labelmap"][1].astype(int)
        if not labels.all():
            found["labelmap", "remark"] = "with LabelMap 0 somewhere, a class without a name"
        if "normals" in planes:
            floor = planes["normals"][1][labels == FLOOR] / 127.5 - 1
    return found, floor.sum(), floor.size


KINDS = ("missing", "unreadable", "size", "range")  # of a Fault


def check(root):
    """Print what the data set holds and lacks; return the tasks that it could train, and all ids."""
    splits = {split: read_ids(root, split) for split in ("train", "val")}
    both = sorted(set(splits["train"]) & set(splits["val"]))
    if both:
        print(f"in both train.txt and val.txt: {len(both)} ids, {', '.join(both[:3])}")
    heads = ("expected", "there", "missing", "unreadable", "wrong size", "bad values")
    print(f"{'split':6}{'kind':12}" + "".join(f"{head:>12}" for head in heads))
    faulty = collections.defaultdict(set)  # map → ids
    for split, ids in splits.items():
        cases, down, floor = collections.defaultdict(list), 0.0, 0
        examined = parallel(_examine, [(root, id) for id in ids], f"check {split}")
        for id, (found, total, number) in zip(ids, examined):
            for (name, kind), text in found.items():
                cases[name, kind].append((id, text))
                faulty[name].update({id} if kind in KINDS else ())
            down, floor = down + total, floor + number
        for name in maps_of(TASKS):
            counts = [len(cases[name, kind]) for kind in KINDS]
            row = (len(ids), len(ids) - counts[0], *counts)
            print(f"{split:6}{name:12}" + "".join(f"{number:12}" for number in row))
        for (name, kind), found in cases.items():
            if found and kind in KINDS:
                told = f"belong at {' or '.join(MAPS[name].files)}" if kind == "missing" else found[0][1]
                print(f"  {name}, {kind}: {', '.join(id for id, _ in found[:3])}: {told}")
            if found and kind == "remark":
                print(f"  remark: {len(found)} images, {name} {found[0][1]}")
        print(f"  {len(cases['human_parts', 'people']) / len(ids):.0%} of the images have human parts")
        if floor:
            sign = ("as expected" if down < 0 else "UPSIDE DOWN: floors should look up; negate channel 1 in "
                    "decode_normals and delete the cache")
            print(f"  floor normals: mean of channel 1 is {down / floor:+.2f}, {sign}")
    tasks = [task for task in TASKS if not both and not any(faulty[name] for name in maps_of([task]))]
    return tasks, splits["train"] + splits["val"]


def draw_contact(root, ids, tasks, path):
    """8 images of the data set, spread over `ids`, with the targets of `tasks`."""
    rows, maps = [], maps_of(tasks)
    for id in ids[::max(1, len(ids) // 8)][:8]:
        planes = torch.from_numpy(read_planes(root, id, maps))
        painted = [paint(TASKS[task], x[0].numpy()) for task, x in targets(planes[None], tasks).items()]
        rows.append([pick(planes, "image", maps).permute(1, 2, 0).numpy(), *painted])
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

    headings = [name for name, colour in legend if colour is None]
    indent = left + max((int(font.getlength(name)) + 2 * gap for name in headings), default=0)
    x, y = width, y - line  # the first entry begins a line
    for name, colour in legend:
        wide = int(font.getlength(name)) + 32
        if colour is None or x + wide > width:
            x, y = left if colour is None else indent, y + line
        if colour is not None:
            draw.rectangle((x, y + 4, x + 13, y + 17), fill=colour, outline="silver")
        draw.text((x if colour is None else x + 19, y + line // 2), name, "black", font, "lm")
        x = indent if colour is None else x + wide
    canvas = canvas.crop((0, 0, width, y + line + gap))
    if path:
        write_atomically(path, lambda file: canvas.save(file, "PNG", optimize=True))
    return canvas


# ------------------------------------------------------------------------------------ how the commands behave


class UserError(Exception):
    """Something the user can mend: the commands print it as one line and exit with code 2."""


class Fault(UserError):
    """A file that cannot be used. kind: missing, unreadable, size or range."""

    def __init__(self, kind, message):
        super().__init__(kind, message)
        self.kind, self.message = kind, message

    def __str__(self):
        return self.message


@contextlib.contextmanager
def reading(path, advice="replace the file by a good copy"):
    """Whatever a reader raises inside becomes one Fault, which names the file, the reason and the way out."""
    try:
        yield
    except Fault as fault:
        raise Fault(fault.kind, f"{path} {fault}") from None
    except Exception as error:  # Pillow, scipy and json raise nearly anything on a broken file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise Fault("unreadable", f"cannot read {path} ({reason}): {advice}") from None


def write_atomically(path, write):
    """`write(file)` into a temporary file and rename it: `path` is whole or as it was, at any moment."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # torch.save's, who met something else: Ctrl-C, a full disk
        if isinstance(error.__context__, (KeyboardInterrupt, OSError)):
            raise error.__context__ from None
        reason = str(error).split("\n")[0]
        raise UserError(f"cannot write {path} ({reason}): make room, or name another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, lambda file: file.write(json.dumps(value, allow_nan=False).encode()))


def remove_leavings(folder):
    """Delete the temporary files of `write_atomically` whose process was killed."""
    for path in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(ValueError, PermissionError):  # no number, or another user's process
            try:
                if os.name == "posix":
                    os.kill(int(path.name.split(".")[-2]), 0)  # 0: only asks whether it lives
            except (ProcessLookupError, OverflowError):
                path.unlink(missing_ok=True)


def pick_device(name=None, index=0):
    """The device that a command runs on. Raises UserError for one that isn't there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name, index) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device).item()
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"no device {name} here: expected cpu, or cuda where torch has it") from None


def precision(device):
    """bfloat16 on a GPU that computes it natively (compute capability 8.0 on), else float32."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def autocast(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def command(parser, job, argv=None):
    """Parse the command line and do the job; whatever the user got wrong ends in one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where its encoding lacks ↑, Δ, × or °: ?
            stream.reconfigure(errors="replace")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = lambda message: parser.exit(2, f"error: {' '.join(message.split())}\n")
    args = parser.parse_args(argv)
    try:
        with interrupts():
            return job(args)
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; the same command goes on or starts again\n")
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except concurrent.futures.BrokenExecutor:
        parser.error("a worker process was killed, most likely for want of memory: free some and start again")
    except (MemoryError, torch.OutOfMemoryError) as error:
        parser.error(f"out of memory ({error}): lower --micro-batch or --size, or add --checkpointing")
    except OSError as error:  # a full disk, a folder that cannot be written
        parser.error(f"{error.filename or 'a file'}: "
                     f"{error.strerror or error}; mend that or name another path")


@contextlib.contextmanager
def interrupts():
    """Hear Ctrl-C, always. Python drops an exception that is raised while it destroys an object, such as a
    generator: so KeyboardInterrupt is raised again each second until the block ends. What cleans up after it
    is not interrupted again."""
    def interrupt(*_):
        if timer:
            signal.setitimer(signal.ITIMER_REAL, 1)
        raise KeyboardInterrupt

    timer, before = hasattr(signal, "setitimer"), signal.getsignal(signal.SIGINT)  # Windows has no timer
    if before != signal.SIG_IGN:  # a job in the background ignores it
        signal.signal(signal.SIGINT, interrupt)
        if timer:
            signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        before = signal.SIG_IGN
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if timer:
            signal.setitimer(signal.ITIMER_REAL, 0)


def progress(items, total, what):
    """Pass `items` on, showing on a terminal how many of `total` have come and how long it will take."""
    start = time.time()
    for n, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            left = duration((time.time() - start) / n * (total - n))
            bar = "█" * (24 * n // total)
            end = "\n" if n == total else ""
            print(f"\r{what:12}{n:6}/{total} {bar:24} {left} left", end=end, file=sys.stderr, flush=True)


def duration(seconds):
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent alone
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()  # a parent that is killed cannot end its workers
    os._exit(1)


@contextlib.contextmanager
def workers():
    """A pool of processes, one a core; spawned, since a fork would inherit torch's threads half alive."""
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")  # read by those who start now
    pool = concurrent.futures.ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"),
                                                  initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nobody waits for what is queued


def ahead(function, items, pool, depth=8):
    """`function` of every item, in order, worked out by `pool` at most `depth` items ahead."""
    futures = collections.deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > depth:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def parallel(function, items, what):
    """`function` of every item, in order, with a progress bar; on all cores where that pays."""
    if len(items) < 48:
        yield from progress(map(function, items), len(items), what)
    else:
        with workers() as pool:
            yield from progress(ahead(function, items, pool, 64), len(items), what)


# --------------------------------------------------------------------------------------------- the demo world

DEMO = {"train": 1200, "val": 300, "size": 160}  # the demo made unasked: images, and their longest side

# Each thing: VOC class (0: none), PASCAL-Context id, solids. Front is +x, left +z; ± is one on each side. A
# solid: its shape, paint (/part), then x y z, height, half-width, half-depth; or, if it does not stand
# upright, two ends and a radius.
THINGS = """
sky 0 360: box sky 0 -80 90 160 200 1
floor 0 158: box ground 0 -1 0 1 60 60
grass 0 187: box meadow 0 -1 0 1 60 60
wall 0 440: box stone 0 -1 7.5 7 20 .1, box stone 5 -1 0 7 .1 20
box 0 37: box wood 0 0 0 .55 .33 .45
ball 0 10: ball cloth 0 0 0 .5 .25 .25
bottle 5 34: rod gloss 0 0 0 .5 .14 .14, ball gloss 0 .34 0 .32 .14 .14, rod gloss 0 .5 0 .36 .05 .05,
    rod plain 0 .14 0 .28 .145 .145
car 7 59: box gloss 0 .2 0 .42 1.25 .56, limb dark -.9 .62 0 .5 .62 0 .48, box dark 0 .24 0 .08 1.32 .5,
    limb gloss -.68 .68 0 .28 .68 0 .46, rod dark .78 .25 ±.4 .78 .25 ±.6 .25,
    rod gloss .78 .25 ±.4 .78 .25 ±.61 .14,
    rod dark -.78 .25 ±.4 -.78 .25 ±.6 .25, rod gloss -.78 .25 ±.4 -.78 .25 ±.61 .14
cat 8 65: limb fur -.36 .34 0 .36 .38 0 .13, ball fur .46 .42 0 .28 .14 .14, ball fur .46 .6 ±.1 .24 .03 .06,
    limb fur .3 .34 ±.08 .32 0 ±.09 .05, limb fur -.32 .34 ±.08 -.32 0 ±.09 .05,
    limb fur -.36 .36 0 -.62 .34 0 .04, limb fur -.6 .32 0 -.72 .76 0 .04
chair 9 72: box cloth 0 .43 0 .06 .26 .26, box wood -.25 .74 0 .28 .03 .25, box wood .22 0 ±.22 .44 .03 .03,
    box wood -.25 0 ±.22 .8 .03 .03
dog 12 113: limb fur -.36 .5 0 .4 .54 0 .16, limb fur .28 .5 0 .48 .82 0 .1, ball fur .46 .62 0 .3 .15 .15,
    limb fur .5 .74 0 .78 .69 0 .08, ball dark .77 .69 0 .06 .035 .04, ball hair .45 .57 ±.15 .3 .07 .04,
    limb fur .32 .48 ±.1 .32 0 ±.1 .06, limb fur -.34 .48 ±.1 -.36 0 ±.1 .06,
    limb fur -.36 .52 0 -.58 .78 0 .04
person 15 284: limb plain/torso 0 .8 0 .26 .13 .18, limb cloth/torso .01 .96 0 .54 .12 .2,
    rod skin/neck .03 1.45 0 .13 .05 .05, ball skin/head .05 1.54 0 .28 .12 .11,
    ball hair/hair .01 1.61 0 .24 .12 .12, ball dark/±eye .16 1.68 ±.04 .04 .015 .015,
    limb cloth/±uarm .02 1.45 ±.19 .02 1.14 ±.27 .07,
    limb skin/±larm .02 1.17 ±.27 .04 .88 ±.29 .055, ball skin/±hand .04 .9 ±.29 .05 .77 ±.29 .055,
    limb plain/±uleg 0 .96 ±.1 0 .46 ±.12 .1, limb plain/±lleg 0 .5 ±.12 0 .06 ±.13 .075,
    limb dark/±foot -.08 .05 ±.13 .2 .04 ±.14 .06
pottedplant 16 308: rod cloth 0 0 0 .3 .2 .2, rod cloth 0 .28 0 .08 .24 .24,
    limb leaf 0 .3 0 .3 .95 ±.12 .07, limb leaf 0 .3 0 -.28 .9 ±.15 .07, limb leaf 0 .3 0 .1 .7 ±.42 .07
sofa 18 368: box cloth 0 .08 0 .22 .42 .85, limb cloth -.34 .1 0 .85 .16 .95,
    limb cloth -.4 .4 ±.85 .46 .4 ±.85 .15
tvmonitor 20 427: box dark 0 .09 0 .66 .06 .52, box gloss .05 .14 0 .56 .02 .47, rod dark 0 0 0 .1 .16 .22
"""
THINGS = {head.split()[0]: (*map(int, head.split()[1:]), solids.split(",")) for head, solids in
          (line.split(": ") for line in THINGS.replace("\n    ", "").strip().split("\n"))}
ROOM = "sky floor grass wall".split()
INDOORS = "bottle bottle cat chair chair dog pottedplant sofa sofa tvmonitor tvmonitor ball box".split()
OUTDOORS = "bottle car car car cat chair dog dog pottedplant ball box".split()
# degrees that limbs turn at hips, knees, shoulders and elbows, left and right
POSES = ((2, -2, 0, 0, 0, 5, 10, 15), (28, -20, -5, -35, -28, 30, 20, 40), (0, 3, 0, -6, 0, 140, 15, 35),
         (4, -4, 0, 0, 165, 155, 10, 20), (9, -8, -4, -9, 80, 5, 10, 20), (84, 80, -84, -78, 20, 25, 50, 60))
JOINTS = ("uleg lleg foot", "lleg foot", "uarm larm hand", "larm hand")
SHAPES = {"box": -1, "rod": 0, "limb": .5, "ball": 1}  # if round, the bulge: x² + z² = 1 − bulge · y²
NOISE = np.random.default_rng(0).normal(.5, .8, (256, 256)).astype(np.float32)
NOISE = scipy.ndimage.gaussian_filter(NOISE, 1, mode="wrap")


def _noise(u, frequency):
    return NOISE[tuple(((u[k] + .6 * u[1]) * frequency).astype(int) % 256 for k in (0, 2))]


# how much of a paint's second colour shows at u (3, pixels), in metres from the middle of the solid
TEXTURES = {"plain": lambda u: .2 * _noise(u, 20), "stripes": lambda u: 7 * u[1] % 1 < .5,
            "mottled": lambda u: .6 * _noise(u, 8) + .4 * _noise(u, 50),
            "checks": lambda u: np.floor(6 * u).sum(0) % 2,
            "spots": lambda u: ((6 * u % 1 - .5) ** 2).sum(0) < .17,
            "tiles": lambda u: .8 * (np.minimum(2 * u[0] % 1, 2 * u[2] % 1) < .06) + .2 * _noise(u, 16),
            "grain": lambda u: .5 + .5 * np.sin(36 * u[1] + 12 * u[2] + 5 * _noise(u, 6))}
# first colour (0: any), the second relative to it (0: any), textures
PAINTS = {"cloth": (0, 0, "plain stripes checks spots"), "plain": (0, 0, "plain"), "gloss": (0, .8, "plain"),
          "skin": ((.85, .65, .5), .9, "plain"), "hair": ((.3, .22, .13), .5, "mottled"),
          "leaf": ((.2, .5, .15), .5, "mottled"), "fur": ((.6, .47, .35), .4, "stripes mottled spots"),
          "wood": ((.55, .37, .2), .7, "grain"), "stone": ((.6, .58, .55), .8, "plain mottled stripes"),
          "sky": ((.6, .8, 1), 1.2, "plain"), "dark": ((.08, .08, .1), 1.5, "plain"),
          "meadow": ((.3, .5, .2), .6, "mottled"),
          "ground": ((.6, .55, .5), .7, "tiles tiles checks grain mottled")}


def _paint(rng, name):
    """Two colours and a texture, as seven numbers."""
    first, relation, textures = PAINTS[name]
    any_two = rng.uniform(.08, .95, (2, 3))
    first = np.multiply(first, rng.uniform(.5, 1.3)) + any_two[0] * .1 - .05 if first else any_two[0]
    second = first * relation if relation else any_two[1]
    return *np.clip([*first, *second], .02, 1), list(TEXTURES).index(rng.choice(textures.split()))


def _solids(rng, name, where, heading):
    """The solids of a thing that stands at `where`: part, bulge, paint, axes (as columns), centre of each."""
    rows = [row.replace("±", sign).split() for row in THINGS[name][2] for sign in "+-"[:1 + ("±" in row)]]
    paint, _, parts = zip(*(row[1].partition("/") for row in rows))
    parts = [part.replace("+", "l").replace("-", "r") for part in parts]
    paints = {name: _paint(rng, name) for name in sorted(set(paint))}
    numbers = [list(map(float, row[2:])) for row in rows]
    numbers = np.array([[x, y, z] + ([x, y + q[0], z, *q[1:]] if len(q) == 3 else q + q[3:])
                        for x, y, z, *q in numbers])
    ends, limb = numbers[:, :6].reshape(-1, 2, 3), np.array([[row[0] == "limb"] for row in rows])
    if name == "person":  # turn the limbs at the joints, then put the figure on the floor
        for k, angle in enumerate(rng.choice(POSES) + rng.normal(0, 6, 8)):
            moving = [parts.index("lr"[k % 2] + part) for part in JOINTS[k // 2].split()]
            flat = ends[moving] @ [1, 1j, 0]
            flat = flat[0, 0] + (flat - flat[0, 0]) * np.exp(1j * np.radians(angle))
            ends[moving, :, 0], ends[moving, :, 1] = flat.real, flat.imag
        ends[..., 1] -= ends[..., 1].min() - .04
    up = (ends[:, 1] - ends[:, 0]) / 2
    length = np.linalg.norm(up, axis=1, keepdims=True)
    if name != "person":  # no two animals, plants or sofas have the same limbs
        up += rng.normal(0, .06, up.shape) * length * limb
    frame = np.linalg.qr(np.stack([up, up * 0 + [0, 0, 1], up * 0 + [1, 0, 0]], 2))[0]  # up, depth, width
    axes = frame[:, :, [2, 0, 1]] * np.stack([numbers[:, 6:7], length, numbers[:, 7:]], 2)
    cos, sin = np.cos(heading), np.sin(heading)
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    if name not in ROOM:
        turn = turn * rng.uniform(.85, 1.15) * rng.uniform(.93, 1.07, 3)
    bulges = [SHAPES[row[0]] for row in rows]
    return zip(parts, bulges, [paints[name] for name in paint], turn @ axes, ends.mean(1) @ turn.T + where)


def _furnish(rng, reach, crowd, people):
    """The things in a scene, (name, solids), the room first; the view is `reach` wide at a distance of 1."""
    indoors, angle, persons = rng.random() < .55, rng.uniform(-.5, .5), int(people + 1 - rng.random())
    room = ["sky", "floor", "wall"] if indoors else ["sky", rng.choice(["floor", "grass"])]
    things = [(name, _solids(rng, name, np.zeros(3), angle * (name != "sky"))) for name in room]
    places = []
    wanted = list(rng.choice(INDOORS if indoors else OUTDOORS, crowd))
    wanted += ["person"] * persons
    for name in rng.permutation(wanted):
        large = name in ("car", "sofa")
        where = rng.uniform([-reach / 2, 0, 2.7 + large], [reach / 2, 0, 2.7 + crowd / 2 + large])
        where[0] *= where[2]
        if all(np.linalg.norm(where - other) > .9 + .3 * large for other in places):
            places.append(where)
            turned = name in ("car", "cat", "dog", "chair")
            heading = rng.uniform(-3, 3) if turned else rng.normal(-1.57, .7)
            things.append((name, _solids(rng, name, where, heading)))
    return things


def _trace(axes, centres, bulges, eye, target, height, width, pixels):
    """A camera's axes in the world, its rays (3, H, W) with z = 1, the solid each meets first, and its depth.

    In a solid's own space a ray o + t d is inside while |y| ≤ 1 and x² + z² ≤ 1 − bulge · y²;
    in a box, |x|, |z| ≤ 1.
    """
    right = np.cross([0, 1, 0], target - eye)
    view = np.stack([right, np.cross(right, target - eye), target - eye])
    view = (view / np.linalg.norm(view, axis=1, keepdims=True)).astype(np.float32)
    axes, centres = view @ axes, (centres - eye) @ view.T
    rays = np.ones((3, height, width), np.float32)
    rays[1], rays[0] = (np.mgrid[.5:height, .5:width] - [[[height / 2]], [[width / 2]]]) / pixels
    corners = centres[:, :, None] + axes @ (np.indices((2, 2, 2)).reshape(3, 8) * 2 - 1)
    screen = corners[:, :2] / np.maximum(corners[:, 2:], .1) * pixels + [[width / 2], [height / 2]]
    windows = np.maximum([screen.min(2), screen.max(2) + 1], 0).astype(int)
    ids, depth = np.zeros((height, width), np.int16), np.full((height, width), np.inf, np.float32)
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(*windows.tolist())):
        window = np.s_[y0:y1, x0:x1]
        inverse = np.linalg.inv(axes[i])
        o, d = -inverse @ centres[i], inverse @ rays[:, y0:y1, x0:x1].reshape(3, -1) + np.float32(1e-9)
        near, far = -o[:, None] / d - abs(1 / d), -o[:, None] / d + abs(1 / d)
        if bulges[i] < 0:
            near, far = near.max(0, initial=0), far.min(0, initial=1e9)
        else:
            a, b, c = (np.array([1, bulges[i], 1], np.float32) @ q for q in (d * d, d * o[:, None], o * o))
            root = np.sqrt(np.maximum(b * b - a * (c - 1), 0))
            near, far = np.maximum(near[1], (-b - root) / a), np.minimum(far[1], (-b + root) / a)
        near, far = (t.reshape(depth[window].shape) for t in (near, far))
        hit = (0 < near) & (near < far) & (near < depth[window])
        depth[window][hit] = near[hit]
        ids[window][hit] = i
    return view, rays, ids, depth


def _normals(local, bulges, inverse):
    """Unit normals (3, n) in the world of points `local` (3, n) on solids, in each solid's own space."""
    size = abs(local)
    flat = np.sign(local) * (size == np.where(bulges < 0, size.max(0), size[1]))  # a box, or a rod's ends
    curved = local * np.stack([np.ones_like(bulges), bulges, np.ones_like(bulges)])
    normal = np.einsum("nji,jn->in", inverse, np.where((bulges < 0) | (size[1] > .999), flat, curved))
    return normal / np.linalg.norm(normal, axis=0)


def _albedo(place, paints):
    """Colours (3, n) before any light. place (3, n): metres from the solid's middle, paints (n, 7)."""
    first, second, texture = np.split(paints.T, [3, 6])
    mix = np.zeros(place.shape[1], np.float32)
    for k, function in enumerate(TEXTURES.values()):
        mix[texture[0] == k] = function(place[:, texture[0] == k])
    return first + (second - first) * mix


def _lit(points, solids, lamp, target, pixels):
    """Whether the lamp sees each of points (3, n): by the depth of solids in its own picture of the scene."""
    view, _, _, reach = _trace(*solids, lamp, target, pixels, pixels, 1.6 * pixels)
    x, y, z = view @ (points - lamp[:, None])
    x, y = (np.clip((q / z * 1.6 + .5) * pixels, 0, pixels - 1).astype(int) for q in (x, y))
    return z < reach[y, x] + .1


def _render(seed, height, width, fine, shadow, crowd, people, zoom):
    """A photo (H, W, 3), the names of the things, and for each pixel: which thing, which part, depth, normal.

    `fine` × `fine` rays a pixel, a shadow map of `shadow` × `shadow`, at most `crowd` things (the more, the
    farther away) and on average `people` people.
    """
    rng = np.random.default_rng(seed)
    zoom *= rng.uniform(1, 1.35) * max(height, width)  # pixels that a metre takes at a distance of one
    h, w = height * fine, width * fine
    names, solids = zip(*_furnish(rng, width / zoom, crowd, people))
    owner, solids = zip(*((k, solid) for k, group in enumerate(solids) for solid in group))
    parts, *arrays = zip(*solids)
    bulges, paints, axes, centres = (np.array(a, np.float32) for a in arrays)
    eye, target = np.array([[0, rng.uniform(1, 1.9), 0], [0, rng.uniform(.4, .8), 4.2]], np.float32)
    lamp = target + 12 * np.array([rng.uniform(-.7, .7), .9, rng.uniform(-.8, 0)], np.float32)

    view, rays, ids, depth = _trace(axes, centres, bulges, eye, target, h, w, zoom * fine)
    hit = ids.ravel()                                                                    # (n,) of all rays
    points = view.T @ (rays * depth).reshape(3, -1) + eye[:, None]                       # (3, n)
    inverse = np.linalg.inv(axes)[hit]
    local = np.einsum("nij,jn->in", inverse, points - centres[hit].T)                    # (3, n)
    normal = _normals(local, bulges[hit], inverse)
    albedo = _albedo(local * np.linalg.norm(axes, axis=1)[hit].T, paints[hit])

    caster = ~np.isin([names[k] for k in owner], ROOM)
    lit = _lit(points, (axes[caster], centres[caster], bulges[caster]), lamp, target, shadow)
    lit = scipy.ndimage.gaussian_filter(lit.reshape(h, w).astype(np.float32), max(h, w) / 200).ravel()
    toward = (lamp - target) / np.linalg.norm(lamp - target)
    light, ambient = np.float32(rng.uniform([[.5], [.3]], [[.9], [.5]]) * rng.uniform(.85, 1.1, (2, 3)))
    shade = np.outer(light, lit * np.maximum(toward @ normal, 0)) + np.outer(ambient, .8 + .2 * normal[1])

    image = (albedo * shade).reshape(3, height, fine, width, fine).mean((2, 4))
    image = scipy.ndimage.gaussian_filter(image * rng.uniform(1, 1.5), (0, *[rng.uniform(.2, .7)] * 2))
    image += rng.normal(0, rng.uniform(.005, .025), image.shape)
    photo = np.round(np.clip(image, 0, 1).transpose(1, 2, 0) ** .7 * 255).astype(np.uint8)
    normal = (view @ normal * np.array([[1], [1], [-1]], np.float32)).reshape(3, h, w)
    ids = ids[::fine, ::fine]
    owner, part = np.array(owner)[ids], np.array(parts)[ids]
    return photo, names, owner, part, depth[::fine, ::fine], normal[:, ::fine, ::fine]


def scene(seed, height, width):
    """One image of the demo world with all its ground truths, the same for the same arguments.

    image (H, W, 3) uint8, semseg (H, W) VOC class or 255, labelmap (H, W) PASCAL-Context id, saliency (H, W)
    bool, normals (H, W, 3) unit vectors (right, down, towards the viewer), depth (H, W) in metres, objects:
    [(class name, class, mask, parts)], parts being [(part name, mask)], empty but for people.
    Saliency follows a rule that the image alone can teach: a thing scores √(its share of the image) ×
    nearness to the centre × colour contrast to the rest; the best and all above 60% of it stand out.
    """
    image, names, owner, part, depth, normals = _render(seed, height, width, fine=2, shadow=192, crowd=2,
                                                        people=1.3, zoom=1.15)
    voc, context = np.array([THINGS[name][:2] for name in names]).T
    instance = np.where(voc[owner] > 0, owner, 0)
    border = scipy.ndimage.maximum_filter(instance, 3) != scipy.ndimage.minimum_filter(instance, 3)
    objects, saliency = [], np.zeros((height, width))
    for k in np.unique(owner):
        mask = owner == k
        if voc[k]:
            parts = [(str(name), mask & (part == name)) for name in np.unique(part[mask]) if name]
            objects.append((names[k], int(voc[k]), mask, parts))
        if names[k] not in ROOM:
            away = np.hypot(*(np.argwhere(mask).mean(0) / mask.shape - .5))
            contrast = np.linalg.norm(image[mask].mean(0) - image[~mask].mean(0)) / 255 + .1
            saliency[mask] = np.sqrt(mask.mean()) * np.exp(-(away / .35) ** 2) * contrast
    semseg = np.where(border, IGNORE, voc[owner]).astype(np.uint8)
    return {"image": image, "semseg": semseg, "objects": objects, "depth": depth,
            "labelmap": context[owner].astype(np.uint16), "saliency": saliency > .6 * saliency.max(),
            "normals": normals.transpose(1, 2, 0)}


def scene_classes(job):
    """For pretraining: an image (size, size, 3), which of 20 VOC classes show in it. job: (seed, size).

    As in ImageNet the things are large: through a telephoto lens, and a class counts from 1% of the pixels.
    """
    seed, size = job
    image, names, owner, *_ = _render(seed, size, size, fine=1, shadow=96, crowd=2, people=.6, zoom=1.5)
    voc = np.array([THINGS[name][0] for name in names])[owner]
    return image, np.bincount(voc.ravel(), minlength=21)[1:] > size * size / 100


def _struct(rows, *fields):
    """A struct array as Matlab has it: 1 × rows."""
    return np.array([rows], [(field, object) for field in fields])


def _write_scene(job):
    """Render one image and write its files; returns its entry of ImageSets/Parts."""
    root, name, seed, height, width = job
    s = scene(seed, height, width)
    objects = []
    for kind, index, mask, parts in s["objects"]:
        parts = _struct([(part, np.uint8(m)) for part, m in parts], "part_name", "mask")
        objects.append((kind, index, np.uint8(mask), parts))
    anno = _struct([(name, _struct(objects, "class", "class_ind", "mask", "parts"))], "imname", "objects")
    for folder, content in (("human_parts", {"anno": anno}),
                            ("pascal-context/trainval", {"LabelMap": s["labelmap"]})):
        scipy.io.savemat(root / f"{folder}/{name}.mat", content, do_compression=True)
    Image.fromarray(s["image"]).save(root / f"JPEGImages/{name}.jpg", quality=92)
    semseg = Image.fromarray(s["semseg"])
    semseg.putpalette(PALETTE.ravel().tolist())
    folder = "VOC12" if seed // 2 % 2 else "pascal-context"
    semseg.save(root / f"semseg/{folder}/{name}.png", compress_level=1)
    for folder, array in (("normals_distill", (s["normals"] + 1) / 2), ("sal_distill", s["saliency"])):
        Image.fromarray(np.uint8(np.round(255 * array))).save(root / folder / f"{name}.png", compress_level=1)
    return name, [index if mask.mean() > .002 else -1 for _, index, mask, _ in s["objects"]]


def make_demo(root, train=DEMO["train"], val=DEMO["val"], size=DEMO["size"], seed=0):
    """Render a data set in PASCAL-Context's layout; the folder gets its name when all is written. size:
    longest side, pixels; another seed, 0 to 49: other scenes."""
    root = Path(root)
    if root.exists():
        raise UserError(f"{root} exists: name a folder that doesn't, or delete it")
    partial = root.with_name(f"{root.name}.partial")
    for file in (LISTS, "ImageSets/Parts/{}.txt", *(file for kind in MAPS.values() for file in kind.files)):
        (partial / file).parent.mkdir(parents=True, exist_ok=True)
    shapes = ((3, 4), (4, 3), (2, 3), (5, 4), (3, 4), (4, 5), (9, 16), (1, 1))
    jobs = []
    for number, first, year in ((train, 0, 2008), (val, 10**7, 2010)):
        for k in range(number):
            height, width = (round(size * side / max(shapes[k % 8])) for side in shapes[k % 8])
            name = f"{year + k % 2 * (year < 2010)}_{k + 1:06d}"
            jobs.append((partial, name, 2 * 10**7 * seed + first + k, height, width))
    made = list(parallel(_write_scene, jobs, "render"))
    for split, parts in (("train", dict(made[:train])), ("val", dict(made[train:]))):
        (partial / LISTS.format(split)).write_text("".join(f"{name}\n" for name in parts))
        (partial / f"ImageSets/Parts/{split}.txt").write_text(json.dumps(parts))
    write_json(partial / "demo.json", {"train": train, "val": val, "size": size, "seed": seed})
    partial.rename(root)


# --------------------------------------------------------------------------------------------- python data.py

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", metavar="DIR", help="a folder in PASCAL-Context's layout, or the word demo")
    parser.add_argument("--make", nargs=2, type=int, metavar=("N", "M"),
                        help="render a demo of N training and M validation images into DIR")
    parser.add_argument("--size", type=int, default=DEMO["size"],
                        help="longest side of --make's images, pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="K",
                        help="of --make's scenes, 0 to 49: others than the demo's (default %(default)s)")
    return command(parser, run, argv)


def run(args):
    root = Path(args.root)
    if args.make or (args.root == "demo" and not root.exists()):
        train, val = args.make or (DEMO["train"], DEMO["val"])
        allowed = range(1, 10**6), range(1, 10**6), range(32, 4097), range(50)
        if not all(value in values for value, values in zip((train, val, args.size, args.seed), allowed)):
            raise UserError(f"--make {train} {val} --size {args.size} --seed {args.seed}: expected 1 to "
                            "999999 images, 32 to 4096 pixels, a seed from 0 to 49")
        make_demo(root, train, val, args.size, args.seed)
    elif (args.size, args.seed) != (DEMO["size"], 0):
        raise UserError("--size and --seed are those of a demo to be made: add --make N M, or leave them out "
                        f"to check {root}")
    tasks, ids = check(locate(root))
    if tasks:
        path = f"contact_{root.resolve().name}.png"
        draw_contact(root, ids, tasks, path)
        print(f"drawn: {path}")
    if len(tasks) == len(TASKS):
        print("a training could start")
        return 0
    print(f"a training could start with --tasks {','.join(tasks)}: all that these need is whole" if tasks else
          "a training could not start: mend what is listed above")
    return 1


if __name__ == "__main__":
    sys.exit(main())
