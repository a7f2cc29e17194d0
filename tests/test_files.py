import pytest

from sclip_lab.files import chosen, figures, home, replacing, results


def test_home_is_the_environments_word(monkeypatch, tmp_path):
    monkeypatch.setenv("SCLIP_HOME", str(tmp_path))
    assert home() == tmp_path


def test_home_without_a_word_is_the_checkout_or_the_working_directory(monkeypatch, tmp_path, pytestconfig):
    monkeypatch.delenv("SCLIP_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert home() == (pytestconfig.rootpath if (pytestconfig.rootpath / "data").is_dir() else tmp_path)


@pytest.mark.parametrize(("word", "expected"), [(None, "data/results"), ("", "data/results"), ("build/x", "build/x")])
def test_results_are_seen_from_home(word, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("SCLIP_HOME", str(tmp_path))
    monkeypatch.delenv("SCLIP_RESULTS", raising=False)
    monkeypatch.delenv("SCLIP_MODEL", raising=False)
    if word is not None:
        monkeypatch.setenv("SCLIP_RESULTS", word)
    assert results() == tmp_path / expected
    monkeypatch.setenv("SCLIP_RESULTS", str(tmp_path / "absolute"))
    assert results() == tmp_path / "absolute"


def test_what_is_found_with_another_model_stays_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("SCLIP_HOME", str(tmp_path))
    monkeypatch.delenv("SCLIP_RESULTS", raising=False)
    for bundled in ("", "tiny"):
        monkeypatch.setenv("SCLIP_MODEL", bundled)
        assert (chosen(), results(), figures()) == ("tiny", tmp_path / "data" / "results", tmp_path / "figures")
    monkeypatch.setenv("SCLIP_MODEL", "ViT-B-16-quickgelu:some/where/weights.pt")
    folder = "ViT-B-16-quickgelu-some-where-weights.pt"
    assert chosen() == "ViT-B-16-quickgelu:some/where/weights.pt"
    assert (results(), figures()) == (tmp_path / "data" / "results" / folder, tmp_path / "figures" / folder)


def test_replacing_writes_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "table.parquet"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".parquet"
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
