"""Training what is small: one loop for systems that learn a few parameters beside a frozen CLIP.

What a step draws at random, its pictures, their crops and what is dropped out, follows from the seed and the step
alone, so that a run that was killed goes on from its checkpoint to the same weights as one that was not. Optimiser and
schedule are those of ZegCLIP (Zhou et al., CVPR 2023, arXiv:2212.03588), by their released configuration. Launched by
`torchrun`, the loop shares each step among the processes, by torch's DistributedDataParallel.

Letters: b pictures of a batch, H W crop.
"""

import atexit
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sclip_lab.files import replacing

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]  # module, images [b H W 3], truth [b H W] -> loss, a number

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATE = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for every parameter


@dataclass(frozen=True)
class Schedule:
    """`steps` of AdamW, each of `accumulate` batches of `batch` pictures per process. Defaults: ZegCLIP's for VOC.

    The rate rises for `warm_up` steps, and falls to `least` by a power of what is left. Weights decay by `decay`, but
    for those of LayerNorms. precision: "fp32", or "bf16", "fp16" for what autocast runs in half precision.
    """

    steps: int = 20_000
    batch: int = 16
    rate: float = 2e-4
    least: float = 1e-6
    power: float = 0.9
    warm_up: int = 1500
    decay: float = 0.01
    accumulate: int = 1
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        if min(self.steps, self.batch, self.accumulate) < 1:
            raise ValueError(f"{self}: expected at least one step, picture and batch of a step")

    def at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        falling = self.least + (self.rate - self.least) * (1 - step / self.steps) ** self.power
        return falling * min(1.0, (step + 1) / max(self.warm_up, 1))


def train(
    module: nn.Module,
    objective: Objective,
    pictures: Dataset,
    schedule: Schedule = Schedule(),
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 50,
    watch: Callable[[list[float]], None] | None = None,
    workers: int = 0,
    made_with: Mapping[str, str] | None = None,
) -> np.ndarray:
    """Train the parameters of a module, in place, on their device; the loss of every step [steps].

    `pictures`: image uint8 [H W 3] and truth uint8 [H W] by number, endless, such as `crops.Crops`, read in order.
    `checkpoint`: a safetensors file that is replaced, whole, after `every` so many steps and at the end, and gone on
    from where it is there; `restore` reads the weights alone. `watch` is called with the losses so far at every step.
    `workers`: processes that read pictures ahead. `made_with`: what else tells this run from others, beside seed,
    schedule, number of processes and the weights that the module comes with. Random state of the caller is left as it
    is; the module is in eval mode in the end, whatever ends it. Raises FloatingPointError where loss or gradient is no
    number, in fp16 where no scale helps: module and checkpoint are as before that step. Raises ValueError where the
    checkpoint is of another run.
    """
    device = next(module.parameters()).device
    optimiser = torch.optim.AdamW(_groups(module, schedule.decay), lr=schedule.rate)
    scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "fp16")
    model, rank, world = _shared(module)
    run = {"seed": str(seed), "schedule": str(schedule), "processes": str(world), "first weights": digest(module)}
    run = {**(made_with or {}), **run}
    losses = _resume(module, optimiser, scaler, checkpoint, run)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _in_training(module):
        numbers = range(len(losses) * schedule.accumulate, schedule.steps * schedule.accumulate)
        first = [schedule.batch * (number * world + rank) for number in numbers]
        own = [list(range(start, start + schedule.batch)) for start in first]
        batches = iter(DataLoader(pictures, batch_sampler=own, num_workers=workers))
        steps = range(len(losses), schedule.steps)
        bar = tqdm(steps, "training", initial=len(losses), total=schedule.steps, file=sys.stdout, disable=rank > 0)
        for step in bar:
            torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
            for group in optimiser.param_groups:
                group["lr"] = schedule.at(step)
            loss = _step(model, objective, batches, optimiser, scaler, schedule, device)
            if not math.isfinite(loss):
                kept = f"{checkpoint} holds an earlier one" if checkpoint and checkpoint.exists() else "no checkpoint"
                raise FloatingPointError(f"loss or gradient is no number at step {step} ({kept}): try a lower rate")
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}")
            if watch and rank == 0:
                watch(losses)
            if checkpoint and rank == 0 and (len(losses) % every == 0 or len(losses) == schedule.steps):
                _save(module, optimiser, scaler, checkpoint, run, losses)
    return np.array(losses)


@contextmanager
def _in_training(module: nn.Module) -> Iterator[None]:
    module.train()
    try:
        yield
    finally:
        module.eval()


def _step(
    model: nn.Module,
    objective: Objective,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    schedule: Schedule,
    device: torch.device,
) -> float:
    """One step of the optimiser; its loss, mean over batches and processes, or NaN where nothing was changed."""
    optimiser.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    half = torch.autocast(device.type, PRECISIONS[schedule.precision], enabled=schedule.precision != "fp32")
    for part in range(schedule.accumulate):
        images, truth = (tensor.to(device, non_blocking=True) for tensor in next(batches))
        more = part + 1 < schedule.accumulate  # to come, after which gradients of all processes meet
        with model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext():
            with half:
                loss = objective(model, images, truth) / schedule.accumulate
            scaler.scale(loss).backward()
        total += loss.detach()
    if isinstance(model, DistributedDataParallel):
        dist.all_reduce(total)
        total /= dist.get_world_size()
    scaler.unscale_(optimiser)
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    if not scaler.is_enabled():  # it leaves out a step of infinite gradients, and goes on with a smaller scale
        total = torch.where(torch.nn.utils.get_total_norm(gradients).isfinite(), total, torch.nan)
    if total.isfinite():
        scaler.step(optimiser)
        scaler.update()
    return total.item() if not scaler.is_enabled() or scaler.get_scale() >= 1 else math.nan


def digest(module: nn.Module) -> str:
    """A short name for the weights of a module."""
    hashed = hashlib.sha256()
    for value in module.state_dict().values():
        hashed.update(value.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def _groups(module: nn.Module, decay: float) -> list[dict]:
    norms = [p for layer in module.modules() if isinstance(layer, nn.LayerNorm) for p in layer.parameters()]
    known = set(map(id, norms))
    others = [p for p in module.parameters() if id(p) not in known]
    return [{"params": others, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]


def _shared(module: nn.Module) -> tuple[nn.Module, int, int]:
    """The module as it is to be called, this process's number and how many there are, as `torchrun` says."""
    if not dist.is_torchelastic_launched():
        return module, 0, 1
    if not dist.is_initialized():  # once for all that this process trains: a group cannot be made again
        dist.init_process_group("nccl" if next(module.parameters()).is_cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    return DistributedDataParallel(module), dist.get_rank(), dist.get_world_size()


def own_device() -> torch.device:
    """The GPU of this process, as `torchrun` numbers them, or the first one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def live(every: int = 20) -> Callable[[list[float]], None]:
    """A `watch` for notebooks: one picture of the losses so far, drawn anew every so many steps."""
    from IPython.display import display
    from matplotlib.figure import Figure

    shown = display("", display_id=True)

    def draw(losses: list[float]) -> None:
        if len(losses) % every == 0:
            figure = Figure(figsize=(6, 2))
            figure.add_subplot(xlabel="step", ylabel="loss", yscale="log").plot(losses, linewidth=1)
            shown.update(figure)

    return draw


def restore(module: nn.Module, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into a module of the same kind, in eval mode.

    Raises ValueError, in one line, for a file that holds no such weights.
    """
    with _opened(checkpoint) as file:
        module.load_state_dict({name: file.get_tensor(f"weights.{name}") for name in module.state_dict()})
    module.eval()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A checkpoint, while it is read; what is wrong with it is said in one line."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, RuntimeError) as error:
        why = shorten(str(error), 160)
        raise ValueError(f"{path} is no checkpoint of what is trained ({why}): delete it, or name another") from None


def _save(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    path: Path,
    run: dict[str, str],
    losses: list[float],
) -> None:
    tensors = {f"weights.{name}": value.contiguous() for name, value in module.state_dict().items()}
    if bad := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise FloatingPointError(f"{bad[0]} is no number after step {len(losses)}: {path} is kept; try a lower rate")
    for name, p in module.named_parameters():
        tensors |= {f"{key}.{name}": optimiser.state[p][key] for key in STATE if p in optimiser.state}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    with replacing(path) as temporary:
        save_file(tensors, temporary, run | {"scaler": json.dumps(scaler.state_dict())})


def _resume(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    path: Path | None,
    run: dict[str, str],
) -> list[float]:
    """Put a checkpoint's values into all that learns; the losses so far, none where there is no checkpoint."""
    if not path or not path.exists():
        return []
    with _opened(path) as file:
        found = file.metadata() or {}
        for key, value in run.items():
            if found.get(key) != value:
                raise ValueError(f"{path} is of {key} {found.get(key)}, not {value}: delete it, or go on as it began")
        restore(module, path)
        for name, p in module.named_parameters():
            if f"step.{name}" in file.keys():  # noqa: SIM118
                moments = {key: file.get_tensor(f"{key}.{name}").to(p.device) for key in STATE[1:]}
                optimiser.state[p] = {"step": file.get_tensor(f"step.{name}"), **moments}
        if scaler.is_enabled():
            scaler.load_state_dict(json.loads(found["scaler"]))
        return file.get_tensor("losses").tolist()
