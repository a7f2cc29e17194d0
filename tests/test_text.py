import gc
import os
import weakref
from copy import deepcopy
from dataclasses import replace

import open_clip
import pytest
import torch

from sclip_lab import text
from sclip_lab.clip import Clip

CLASSES = ["background: sky|grass", "person|person in shirt", "cat"]


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
        text_cfg={"width": 32, "heads": 2, "layers": 2},
    ).eval()
    torch.nn.init.normal_(model.positional_embedding)  # without it all texts of a fresh tower are much alike
    torch.nn.init.normal_(model.token_embedding.weight)
    return Clip("small", model, open_clip.SimpleTokenizer(), (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("templates", [None, ["{}"], ["a photo of a {}.", "{} in a picture of {}"]])
def test_vectors_equal_open_clips_zero_shot_classifier(clip, templates):
    words = ["sky", "grass", "person", "person in shirt", "cat"]
    formats = open_clip.OPENAI_IMAGENET_TEMPLATES if templates is None else [t.replace("{}", "{0}") for t in templates]
    with torch.no_grad():
        expected = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, words, formats).T
    queries = text.queries(clip, CLASSES, templates)
    torch.testing.assert_close(queries.vectors, expected, atol=1e-6, rtol=0)
    assert queries.query_class.tolist() == [0, 0, 1, 1, 2]
    assert queries.names == ["background", "person", "cat"]


def test_a_word_of_two_classes_has_one_vector(clip):
    vectors = text.queries(clip, ["background: bed|sky", "bed"], ["{}"]).vectors
    assert torch.equal(vectors[0], vectors[2])


def test_templates_are_the_eighty_of_openai():
    assert len(text.TEMPLATES) == 80
    assert [t.replace("{}", "cat") for t in text.TEMPLATES] == [t("cat") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_lines():
    lines = ["background: sky | wall|grass ", "person|person in shirt", " cat", "wood "]
    assert text.parse(lines) == {
        "background": ["sky", "wall", "grass"],
        "person": ["person", "person in shirt"],
        "cat": ["cat"],
        "wood": ["wood"],
    }


def test_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("background: sky|wall\ncafé\n\n", encoding="utf-8")
    expected = {"background": ["sky", "wall"], "café": ["café"]}
    assert text.parse(path) == expected
    assert text.parse(str(path)) == expected


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], r"no class names in \[\]"),
        ("cat", r"classes='cat' is one string: expected a list such as \['cat'\]"),
        (["cat", ""], "class 1 is ''"),
        (["cat", "dog||hound"], r"class 1 is 'dog\|\|hound'"),
        (["cat", ": sky"], "class 1 is ': sky'"),
        (["background:"], "class 0 is 'background:'"),
        (["cat", "dog", "cat|kitten"], "class 2 is named 'cat'"),
        (["cat|kitten|cat"], "expected every word once"),
        (["cat", 3], "class 1 is 3: expected a str"),
        ("absent.txt", r"absent\.txt.*cannot be read"),
    ],
)
def test_unusable_classes_are_refused_in_one_line(classes, message):
    with pytest.raises(ValueError, match=message) as error:
        text.parse(classes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], r"templates=\[\]: expected a list such as \['a photo of a \{\}"),
        ("a photo of a {}.", "templates='a photo"),
        (["a photo"], r"template 'a photo': expected a str with \{\}"),
    ],
)
def test_unusable_templates_are_refused(clip, templates, message):
    with pytest.raises(ValueError, match=message):
        text.queries(clip, CLASSES, templates)


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Copies of a Clip that keep vectors in a folder of this test, and a list of the texts that they encode."""
    monkeypatch.setenv("SCLIP_CACHE", str(tmp_path))
    texts = []

    class Counting(Clip):
        def encode_text(self, batch):
            texts.extend(batch)
            return super().encode_text(batch)

    return lambda clip: Counting(clip.name, clip.model, clip.tokenizer, clip.mean, clip.std), texts


def test_words_are_embedded_once_per_model_and_forgotten_with_it(clip, counted):
    counting, texts = counted[0](clip), counted[1]
    first, again = (text.queries(counting, ["cat", "sky|cat"], ["{}", "a {}"]) for _ in range(2))
    assert texts == ["cat", "a cat", "sky", "a sky"]
    assert torch.equal(first.vectors, again.vectors)
    alone = text.queries(counting, ["cat"], ["{}"])
    assert not torch.equal(alone.vectors[0], first.vectors[0])
    forgotten = weakref.ref(counting)
    del counting
    gc.collect()
    assert forgotten() is None


def test_words_are_embedded_once_for_all_processes(clip, counted, tmp_path):
    copy, texts = counted
    first = text.queries(copy(clip), ["cat", "sky"], ["{}"])
    again = text.queries(copy(clip), ["sky", "cat", "grass"], ["{}"])  # as another process: nothing in memory
    assert texts == ["cat", "sky", "grass"]
    assert torch.equal(again.vectors[:2], first.vectors.flip(0))
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(text.queries(copy(clip), ["cat"], ["{}"]).vectors, first.vectors[:1])
    assert texts == ["cat", "sky", "grass", "cat"]
    whole = bytearray(file.read_bytes())
    whole[-2] ^= 1  # of the last number
    file.write_bytes(whole)
    assert torch.equal(text.queries(copy(clip), ["cat"], ["{}"]).vectors, first.vectors[:1])
    assert texts == ["cat", "sky", "grass", "cat", "cat"]


def test_words_are_kept_though_later_ones_fail(clip, counted):
    copy, texts = counted
    failing = copy(clip)
    encode = failing.encode_text
    object.__setattr__(failing, "encode_text", lambda batch: 1 / 0 if "sky" in batch else encode(batch))
    with pytest.raises(ZeroDivisionError):
        text.queries(failing, ["cat", "sky"], ["{}"])
    text.queries(copy(clip), ["cat", "sky"], ["{}"])
    assert texts == ["cat", "sky"]


def test_vectors_on_disk_are_of_the_same_tower_and_templates(clip, counted):
    copy, texts = counted
    text.queries(copy(clip), ["cat"], ["{}"])
    text.queries(copy(clip), ["cat"], ["a {}"])
    other = replace(copy(clip), model=deepcopy(clip.model))
    with torch.no_grad():
        other.model.ln_final.weight[3] += 1e-3
    text.queries(other, ["cat"], ["{}"])
    assert texts == ["cat", "a cat", "cat"]
    other.model.visual.proj.data.zero_()  # pictures are none of their business
    text.queries(replace(other), ["cat"], ["{}"])
    assert texts == ["cat", "a cat", "cat"]


def test_a_disk_that_takes_nothing_is_no_error(clip, counted, tmp_path):
    copy, texts = counted
    (tmp_path / "text").write_text("a file where a folder would be")
    assert len(text.queries(copy(clip), ["cat"], ["{}"]).vectors) == 1
    assert texts == ["cat"]


@pytest.mark.skipif(os.name != "posix", reason="no limit on files here")
def test_a_full_disk_is_no_error(clip, counted, tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        assert len(text.queries(counted[0](clip), ["cat"], ["{}"]).vectors) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
