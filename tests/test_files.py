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
    monkeypatch.delenv("SCLIP_DATA", raising=False)
    assert (results(), figures()) == (tmp_path / "data" / "results" / folder, tmp_path / "figures" / folder)


def test_what_is_found_on_other_data_stays_apart(monkeypatch, tmp_path):
    for name in ("voc", "photos laid out as voc"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SCLIP_RESULTS", raising=False)
    monkeypatch.setenv("SCLIP_MODEL", "ViT-B-32:openai")
    found = []
    for data in ("", "voc", "./voc/", str(tmp_path / "voc"), "photos laid out as voc"):
        monkeypatch.setenv("SCLIP_DATA", data)
        found.append(results())
        assert figures().relative_to(home() / "figures") == results().relative_to(home() / "data" / "results")
    none, voc, same, absolute, photos = found
    assert none.name == "ViT-B-32-openai"
    assert voc == same == absolute
    assert (voc.parent, photos.parent) == (none, none)
    assert voc.name.endswith("-voc")
    assert photos.name.endswith("-photos-laid-out-as-voc")
    monkeypatch.setenv("SCLIP_MODEL", "tiny")
    assert (results(), figures()) == (home() / "data" / "results", home() / "figures")


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
