"""The training loop: its rates, what a killed run ends in, what a run that breaks leaves, and several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sclip_lab.training import Schedule, live, restore, train

SHORT = Schedule(steps=8, batch=3, rate=0.01, warm_up=2)


class Numbered(torch.utils.data.Dataset):
    """Random pictures by number."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.RandomState(index)
        return rng.randint(0, 256, (8, 8, 3), np.uint8), rng.randint(0, 4, (8, 8)).astype(np.uint8)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(3, 16), nn.LayerNorm(16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 4)
    return nn.Sequential(*layers)


def objective(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images / 255).movedim(-1, 1), truth.long())


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_rate_rises_and_falls_as_torchs_polynomial() -> None:
    schedule = Schedule(steps=50, rate=0.1, least=0, warm_up=10)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    oracle = torch.optim.lr_scheduler.PolynomialLR(optimiser, 50, 0.9)
    for step in range(50):
        assert schedule.at(step) == pytest.approx(oracle.get_last_lr()[0] * min(1, (step + 1) / 10))
        optimiser.step()
        oracle.step()
    assert Schedule(steps=50, least=1e-6).at(50) == pytest.approx(1e-6 * 51 / 1500)


def test_a_step_is_adamw_s_without_decay_of_norms() -> None:
    module, twin = network().eval(), network()
    schedule = Schedule(steps=1, batch=5, rate=0.05, decay=0.3, warm_up=0)
    train(module, lambda model, images, truth: objective(model.eval(), images, truth), Numbered(), schedule)
    optimiser = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0)
    images, truth = (torch.as_tensor(np.stack(parts)) for parts in zip(*(Numbered()[i] for i in range(5)), strict=True))
    objective(twin.eval(), images, truth).backward()
    with torch.no_grad():
        for linear in (twin[0], twin[4]):
            for p in linear.parameters():
                p *= 1 - 0.05 * 0.3
    optimiser.step()
    torch.testing.assert_close(weights(module), weights(twin))


def test_the_seed_decides_and_the_callers_random_state_is_left_alone() -> None:
    runs = [network() for _ in range(3)]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    losses = [train(module, objective, Numbered(), SHORT, seed) for module, seed in zip(runs, (1, 1, 2), strict=True)]
    assert torch.equal(torch.rand(1), expected)
    assert losses[0].shape == (8,)
    assert np.array_equal(losses[0], losses[1])
    assert not np.array_equal(losses[0], losses[2])
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not runs[0].training


def test_every_step_drops_out_other_places() -> None:
    seen: list[Tensor] = []

    def watched(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        seen.append(model[2](torch.ones(200)))
        return objective(model, images, truth)

    train(network(), watched, Numbered(), SHORT)
    assert len({tuple(one.tolist()) for one in seen}) == SHORT.steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_resumed_ends_in_the_same_weights(tmp_path: Path, accumulate: int) -> None:
    schedule = Schedule(steps=8, batch=3, rate=0.01, warm_up=2, accumulate=accumulate)
    whole, broken, resumed = network(), network(), network()
    expected = train(whole, objective, Numbered(), schedule, checkpoint=tmp_path / "whole.safetensors")

    def killed(losses: list[float]) -> None:
        if len(losses) == 6:
            raise KeyboardInterrupt

    path = tmp_path / "broken.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(broken, objective, Numbered(), schedule, checkpoint=path, every=4, watch=killed)
    seen: list[int] = []
    found = train(
        resumed, objective, Numbered(), schedule, checkpoint=path, watch=lambda losses: seen.append(len(losses))
    )
    assert seen == [5, 6, 7, 8]
    assert np.array_equal(found, expected)
    assert torch.equal(weights(resumed), weights(whole))
    kept, full = load_file(path), load_file(tmp_path / "whole.safetensors")
    assert kept.keys() == full.keys()
    assert all(torch.equal(kept[name], full[name]) for name in full)  # the optimiser's state, too


def test_a_run_that_is_done_is_read_and_not_repeated(tmp_path: Path) -> None:
    path, first, again, read = tmp_path / "run.safetensors", network(), network(), network()
    expected = train(first, objective, Numbered(), SHORT, checkpoint=path)
    assert np.array_equal(train(again, None, Numbered(), SHORT, checkpoint=path), expected)  # type: ignore[arg-type]
    restore(read, path)
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(weights(first), weights(read))
    for other, words in ({"seed": 1}, "is of seed 0, not 1"), ({"made_with": {"loss": "b"}}, "is of loss None, not b"):
        with pytest.raises(ValueError, match=words) as error:
            train(network(), objective, Numbered(), SHORT, checkpoint=path, **other)
        assert "\n" not in str(error.value)


def broken_at(step: int, break_: str) -> tuple[nn.Module, object]:
    """A network, and an objective whose loss, or gradient, is NaN at a step."""
    calls = iter(range(100))

    def breaking(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        loss = objective(model, images, truth)
        if next(calls) != step:
            return loss
        # The square root of 0 is 0, but its gradient, times 0, is NaN.
        return loss * torch.nan if break_ == "loss" else loss + (0 * model[0].weight.sum()).sqrt()

    return network(), breaking


@pytest.mark.parametrize("break_", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_what_was_good(tmp_path: Path, break_: str) -> None:
    path, (module, breaking) = tmp_path / "run.safetensors", broken_at(5, break_)
    with pytest.raises(FloatingPointError, match=r"no number at step 5 .*run.safetensors holds an earlier one"):
        train(module, breaking, Numbered(), SHORT, checkpoint=path, every=2)
    with safe_open(path, "pt") as file:
        assert len(file.get_tensor("losses")) == 4
    assert weights(module).isfinite().all()
    whole, resumed = network(), network()
    train(whole, objective, Numbered(), SHORT)
    train(resumed, objective, Numbered(), SHORT, checkpoint=path)
    assert torch.equal(weights(whole), weights(resumed))


def test_weights_that_are_no_numbers_replace_no_checkpoint(tmp_path: Path) -> None:
    path, schedule = tmp_path / "run.safetensors", Schedule(steps=1, batch=1, rate=float("inf"), warm_up=0)
    with pytest.raises(FloatingPointError, match="is no number after step 1"):
        train(network(), objective, Numbered(), schedule, checkpoint=path)
    assert not list(tmp_path.iterdir())


def test_accumulated_batches_are_one_large_batch() -> None:
    large, small = nn.Sequential(network()[0], network()[4]), nn.Sequential(network()[0], network()[4])
    train(large, objective, Numbered(), Schedule(4, batch=6, warm_up=0))
    train(small, objective, Numbered(), Schedule(4, batch=2, warm_up=0, accumulate=3))
    torch.testing.assert_close(weights(small), weights(large))


def test_half_precision_learns_in_single(tmp_path: Path) -> None:
    module, single = network(), network()
    dtypes = []

    def watched(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        dtypes.append(model(images / 255).dtype)
        return objective(model, images, truth)

    losses = train(module, watched, Numbered(), Schedule(8, 3, 0.01, warm_up=2, precision="bf16"))
    assert set(dtypes) == {torch.bfloat16}
    assert weights(module).dtype == torch.float32
    np.testing.assert_allclose(losses, train(single, objective, Numbered(), SHORT), rtol=0.05)
    with pytest.raises(ValueError, match="precision='int8': expected one of fp32, bf16, fp16"):
        Schedule(precision="int8")


def loud(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
    """A loss whose gradients, at the scale that fp16 begins with, are infinite."""
    return 300 * objective(model, images, truth)


def test_fp16_goes_on_with_its_scale(tmp_path: Path) -> None:
    schedule = Schedule(20, 3, 0.01, warm_up=2, precision="fp16")
    whole, broken, resumed, begun = network(), network(), network(), network()
    train(whole, loud, Numbered(), schedule)

    def killed(losses: list[float]) -> None:
        if len(losses) == 14:
            raise KeyboardInterrupt

    path = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(broken, loud, Numbered(), schedule, checkpoint=path, every=2, watch=killed)
    assert not broken.training
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["scaler"])["scale"] < 65536
    train(resumed, loud, Numbered(), schedule, checkpoint=path)
    assert torch.equal(weights(whole), weights(resumed))
    assert not torch.equal(weights(whole), weights(begun))


def test_fp16_ends_where_no_scale_helps() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *gradients: Tensor) -> Tensor:
            return gradients[0] * torch.nan

    def broken(model: nn.Module, images: Tensor, truth: Tensor) -> Tensor:
        return Broken.apply(objective(model, images, truth))

    module, begun = network(), network()
    with pytest.raises(FloatingPointError, match="is no number at step"):
        train(module, broken, Numbered(), Schedule(40, 3, 0.01, warm_up=2, precision="fp16"))
    assert torch.equal(weights(module), weights(begun))


@pytest.mark.parametrize("content", [b"", b"no tensors at all"])
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} is no checkpoint .*: delete it, or name another$"):
        train(network(), objective, Numbered(), SHORT, checkpoint=path)


def test_of_another_shape_or_other_first_weights_no_checkpoint_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    train(network(), objective, Numbered(), SHORT, checkpoint=path)
    with pytest.raises(ValueError, match=rf"^{path} is no checkpoint .*size mismatch.*$"):
        restore(nn.Sequential(nn.Linear(2, 2), *network()[1:]), path)
    other = network()
    nn.init.zeros_(next(other.parameters()))
    before = weights(other)
    with pytest.raises(ValueError, match=rf"^{path} is of first weights .*: delete it, or go on as it began$"):
        train(other, objective, Numbered(), SHORT, checkpoint=path)
    assert torch.equal(weights(other), before)


def test_a_live_curve_is_one_picture_of_the_losses_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    handle = type("Handle", (), {"update": lambda self, figure: drawn.append(figure)})()
    monkeypatch.setattr("IPython.display.display", lambda *_, display_id: handle)
    losses = train(network(), objective, Numbered(), SHORT, watch=live(every=4))
    assert [list(figure.axes[0].lines[0].get_ydata()) for figure in drawn] == [list(losses[:4]), list(losses)]


PARALLEL = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training import *
train(network(), objective, Numbered(), Schedule(1, batch=1))
module = nn.Sequential(network()[0], network()[4])
train(module, objective, Numbered(), Schedule(4, batch=3, warm_up=0, accumulate=2), checkpoint=Path({path!r}))
"""


def test_two_processes_share_a_step_also_in_a_second_training(tmp_path: Path) -> None:
    script, path = tmp_path / "run.py", tmp_path / "run.safetensors"
    script.write_text(PARALLEL.format(tests=str(Path(__file__).parent), path=str(path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(launch, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300)
    together, alone = (nn.Sequential(network()[0], network()[4]) for _ in range(2))
    restore(together, path)
    train(alone, objective, Numbered(), Schedule(4, batch=12, warm_up=0))
    torch.testing.assert_close(weights(together), weights(alone))
