"""The command that trains a system: pictures in, scores and a checkpoint out."""

from pathlib import Path

import pytest
from safetensors import safe_open

from sclip_lab.__main__ import main


@pytest.mark.parametrize("system", ["zegclip", "mvpseg"])
def test_the_command_trains_scores_and_says_where_the_checkpoint_is(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.safetensors"
    asked = ["--model", "tiny", "--limit", "2", "--steps", "2", "--batch", "2", "--output", str(path), "--self-train"]
    assert main(["train", system, *asked]) == 0
    said = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in said[-5:-1]] == ["pixels", "seen", "unseen", "harmonic"]
    assert said[-1] == str(tmp_path / "run-self.safetensors")
    for checkpoint in (path, tmp_path / "run-self.safetensors"):
        assert checkpoint.is_file()
    with safe_open(path, "pt") as file:
        assert len(file.get_tensor("losses")) == 2
