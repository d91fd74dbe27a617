"""The demo: a small world of shaded 3-D shapes and jointed figures, rendered in PASCAL-Context's layout.

`python data.py DIR --make N M` and a first `python train.py` call `make_demo`. All five ground truths come
from one geometry, so that they are exact. Nothing here must be read to understand the method.

A picture is made in this order: `_furnish` puts things into a room, `_solids` turns each into boxes, rods,
limbs and balls, `_trace` finds what each ray meets first, `_render` adds paint, light and a shadow, `scene`
reads the ground truths from what the rays met. Metres; x to the right, y up, z into the picture.
"""

import json
from pathlib import Path

import numpy as np
import scipy.io
import scipy.ndimage
from PIL import Image

from data import DEMO, IGNORE, LISTS, MAPS, PALETTE, UserError, parallel, write_json

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
    made = list(parallel(_write_scene, jobs, len(jobs), "render"))
    for split, parts in (("train", dict(made[:train])), ("val", dict(made[train:]))):
        (partial / LISTS.format(split)).write_text("".join(f"{name}\n" for name in parts))
        (partial / f"ImageSets/Parts/{split}.txt").write_text(json.dumps(parts))
    write_json(partial / "demo.json", {"train": train, "val": val, "size": size, "seed": seed})
    partial.rename(root)

