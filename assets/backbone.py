"""Make the demo's backbone, assets/vit_tiny.pt, anew: 46 minutes on one core.

    python -m assets.backbone FILE

A vit_tiny learns one task, which of the classes are in an image of the demo's world, on scenes that no demo
has. ASE is about what happens after such a pretraining. Beside FILE, in half precision, lies a .json that
tells how it was made.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import ase
import data
from assets.demo import THINGS, _render
from train import learning_rate

CLASSES = 20
PRETRAIN = dict(images=24_000, held_out=400, epochs=8, batch=16, lr=1e-3, seed=0)


def scene_classes(job):
    """An image (size, size, 3), and which of 20 VOC classes show in it. job: (seed, size).

    As in ImageNet the things are large: through a telephoto lens, and a class counts from 1% of the pixels.
    """
    seed, size = job
    image, names, owner, *_ = _render(seed, size, size, fine=1, shadow=96, crowd=2, people=.6, zoom=1.5)
    voc = np.array([THINGS[name][0] for name in names])[owner]
    return image, np.bincount(voc.ravel(), minlength=21)[1:] > size * size / 100


def pretrain(path, images, held_out, epochs, batch, lr, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = ase.ASE(ase.Config(**ase.BACKBONES["vit_tiny"], experts=0, tasks={"classes": CLASSES}))
    classify = torch.nn.Linear(model.config.dim, CLASSES)
    # The patch embedding stays random, as in MoCo v3 (Chen et al. 2021): F1 is better, and patches keep
    # detail that other tasks need. The strong decay keeps tokens small, so that adapters can change them.
    model.patch_embed.requires_grad_(False)
    vit = [p for name, p in model.named_parameters() if ase.part(name) == "backbone"]
    parameters = [p for p in (*vit, *classify.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.3, fused=True)
    jobs = [(10 ** 9 + n, model.config.image) for n in range(images + held_out)]  # seeds of no demo
    scenes = [*data.parallel(scene_classes, jobs, len(jobs), "render")]
    photos = torch.stack([torch.from_numpy(photo).permute(2, 0, 1) for photo, _ in scenes])  # (n, 3, S, S)
    present = torch.stack([torch.from_numpy(classes) for _, classes in scenes]).float()      # (n, 20)

    def logits(x):
        return classify(model.features(data.normalise(x.float(), "imagenet"))[0][0].mean(1))

    start, steps = time.time(), images // batch
    for epoch in range(epochs):
        total, generator = 0.0, torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(images, generator=generator)[:steps * batch].split(batch)
        for step, indices in enumerate(order, epoch * steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps * epochs, lr)
            mirrored = (torch.rand(batch, generator=generator) < 0.5).view(-1, 1, 1, 1)
            x = torch.where(mirrored, photos[indices].flip(3), photos[indices])
            loss = F.binary_cross_entropy_with_logits(logits(x), present[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2}   loss {total / steps:.4f}   {time.time() - start:.0f} s")
    with torch.inference_mode():
        found = torch.cat([logits(x) for x in photos[images:].split(batch)]) > 0
    truth = present[images:] > 0
    found, truth = found[:, truth.any(0)], truth[:, truth.any(0)]  # the demo has 9 of the 20 classes
    f1 = (2 * (found & truth).sum(0) / (found.sum(0) + truth.sum(0)).clamp(min=1)).mean().item()
    print(f"which of {truth.shape[1]} classes are in an image: mean F1 {f1:.1%} on {held_out} held out")
    data.write_json(path.with_suffix(".json"), PRETRAIN | {"f1": f1, "torch": torch.__version__})
    state = {name: p.half() for name, p in model.state_dict().items() if ase.part(name) == "backbone"}
    data.write_atomically(path, lambda file: torch.save(state, file))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, metavar="FILE")
    return data.command(parser, lambda args: pretrain(args.path, **PRETRAIN), argv)


if __name__ == "__main__":
    sys.exit(main())
