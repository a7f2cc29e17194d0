"""The recipe of the bundled CLIP: contrastive training from scratch on pictures and captions, never on label maps.

`python -m sclip_lab.train_tiny` remakes data/tiny.safetensors; interrupted, it goes on from its last checkpoint. The
model is open_clip's `CLIP`, the loss CLIP's (Radford et al. 2021) with equal captions of a batch counted as positives,
and most patches are dropped at random during most of the training (FLIP, Li et al. 2023), which makes it three times
as fast.

Letters: b pictures of a batch, e embedding.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from tqdm import tqdm

from sclip_lab import scenes
from sclip_lab.files import home, replacing
from sclip_lab.images import MEAN, STD, pixels

if TYPE_CHECKING:
    from open_clip import CLIP

CONFIG: dict = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 96, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
SEED = 0  # held-out pictures come from other seeds: datasets.py
BATCH = 256
DROP, SETTLE = 2 / 3, 0.86  # share of patches dropped; share of the steps that drop them, in wide and crowded scenes
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.05, 100


class Batches(torch.utils.data.Dataset):
    """Step -> (pictures uint8 [b H W 3], tokens [b context]): from the step alone, so that a run can resume."""

    def __init__(self, steps: int):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SimpleTokenizer

        self.steps, self.templates = steps, OPENAI_IMAGENET_TEMPLATES
        self.tokenizer = SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[np.ndarray, torch.Tensor]:
        side = CONFIG["vision_cfg"]["image_size"]
        framing = scenes.WIDE if step < SETTLE * self.steps else scenes.CLOSE
        images, _, captions = scenes.draw(BATCH, SEED, (side, side), step * BATCH, framing)
        rng = np.random.RandomState([SEED, step, 1])
        return images, self.tokenizer([self._retell(rng, caption) for caption in captions])

    def _retell(self, rng: np.random.RandomState, caption: str) -> str:
        """The caption as somebody else might put it: not naming everything, or in one of CLIP's 80 templates."""
        groups = [group.split(" and ") for group in caption.split(" on ")]
        if rng.uniform() < 0.35:
            groups = [groups[rng.randint(len(groups))]]
        if rng.uniform() < 0.25:
            groups = [group[: 1 + rng.randint(len(group))] for group in groups]
        words = " on ".join(" and ".join(group) for group in groups)
        return self.templates[rng.randint(len(self.templates))](words) if rng.uniform() < 0.5 else words


def train(steps: int, checkpoint: Path, every: int = 200) -> CLIP:
    """The model after `steps` steps of BATCH pictures; `checkpoint` is written `every` so many and resumed from."""
    model, optimiser = _start(steps)
    first = _resume(model, optimiser, checkpoint, steps)
    batches = torch.utils.data.DataLoader(
        Batches(steps), batch_size=None, sampler=range(first, steps), num_workers=1, prefetch_factor=4
    )
    progress = tqdm(batches, initial=first, total=steps, desc="training the bundled CLIP", unit="step")
    for step, (images, tokens) in enumerate(progress, first):
        loss = _step(model, optimiser, step, steps, images, tokens)
        progress.set_postfix(loss=f"{loss:.3f}")
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss {loss} at step {step}: the checkpoint {checkpoint} is from before; lower the rate"
            )
        if (step + 1) % every == 0 or step + 1 == steps:
            _save_checkpoint(model, optimiser, checkpoint, step + 1, steps)
    return model.eval()


def _start(steps: int) -> tuple[CLIP, Optimizer]:
    import open_clip

    torch.manual_seed(SEED)
    model = open_clip.CLIP(**CONFIG)
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(DROP)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return model.train(), torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def _step(model: CLIP, optimiser: Optimizer, step: int, steps: int, images: np.ndarray, tokens: torch.Tensor) -> float:
    torch.manual_seed(1 + step)  # the patches that are dropped depend on the step alone
    model.visual.patch_dropout.prob = DROP if step < SETTLE * steps else 0.0
    for group in optimiser.param_groups:
        group["lr"] = _learning_rate(step, steps)
    # the fused kernel's backward is four times slower than plain products at 49 tokens on a CPU
    with sdpa_kernel(SDPBackend.MATH):
        with torch.autocast("cpu", torch.bfloat16):
            image_features = model.encode_image(pixels(torch.as_tensor(images), MEAN, STD), normalize=True)
            text_features = model.encode_text(tokens, normalize=True)
        loss = contrastive_loss(image_features.float(), text_features.float(), model.logit_scale.exp(), tokens)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))
    return loss.item()


def contrastive_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy over [b b] cosines of unit vectors [b e]; equal captions share the target."""
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    logits = scale * images @ texts.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _save_checkpoint(model: CLIP, optimiser: Optimizer, path: Path, step: int, steps: int) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimiser.state[p].items():
            tensors[f"{key}.{name}"] = value
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"step": str(step), "steps": str(steps)})


def _resume(model: CLIP, optimiser: Optimizer, path: Path, steps: int) -> int:
    """Put a checkpoint's values into model and optimiser; the step to go on from, 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        written_for, step = file.metadata()["steps"], int(file.metadata()["step"])
        if written_for != str(steps):
            raise ValueError(
                f"{path} belongs to a run of {written_for} steps, not {steps}: delete it or pass --steps {written_for}"
            )
        for name, p in model.named_parameters():
            p.data.copy_(file.get_tensor(f"model.{name}"))
            optimiser.state[p] = {key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
    return step


def bundle(model: CLIP, path: Path, note: dict[str, str]) -> None:
    """Write the model in half precision, with only the rows of the token embedding that training has used."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    embedding = weights.pop("token_embedding.weight")
    weights["token_embedding.rows"] = rows = _used_tokens()
    weights["token_embedding.values"] = embedding[rows.long()].contiguous()
    with replacing(path) as temporary:
        save_file(weights, temporary, note)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(CONFIG | {"mean": MEAN, "std": STD}, indent=1) + "\n")


def _used_tokens() -> torch.Tensor:
    batches = Batches(0)
    words = " and ".join(scenes.NAMES) + " on "
    sentences = [template(words) for template in batches.templates]
    tokens = {token for sentence in sentences for token in batches.tokenizer.encode(sentence)}
    ends = {batches.tokenizer.sot_token_id, batches.tokenizer.eot_token_id, 0}  # 0 fills up the context
    return torch.tensor(sorted(tokens | ends), dtype=torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Remake the bundled CLIP.")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=home() / "data" / "tiny.safetensors")
    parser.add_argument("--checkpoint", type=Path, default=home() / "data" / "cache" / "tiny-training.safetensors")
    arguments = parser.parse_args()
    arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    model = train(arguments.steps, arguments.checkpoint)
    note = {"steps": str(arguments.steps), "batch": str(BATCH), "seed": str(SEED), "torch": torch.__version__}
    bundle(model, arguments.output, note)


if __name__ == "__main__":
    main()
