"""Summaries and comparisons: against one another, and against resampling in plain loops."""

import numpy as np
import pandas as pd
import pytest

from sclip_lab import Protocol, compare, summarise, sweep
from sclip_lab.summary import written


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    sets = ("scenes-full", "scenes-background", "scenes-things")
    return sweep("tiny", sets, ["csa", "identity"], Protocol(96, 96, 48), ["full", "bare"], limit=3)


def test_compare_is_the_difference_of_the_summaries(frame: pd.DataFrame) -> None:
    table = summarise(frame).set_index(["attention", "dataset", "readout"])["miou"]
    found = compare(frame, "csa()", "identity").set_index(["dataset", "readout"])
    assert found["difference"].to_dict() == pytest.approx((table["csa"] - table["identity"]).to_dict())
    same = compare(frame, "csa", "csa")
    assert (same[["difference", "low", "high"]] == 0).all(axis=None)


def test_percentages_are_plain_numbers(frame: pd.DataFrame) -> None:
    numbers = [summarise(frame)["miou"], compare(frame, "csa", "identity")["difference"]]
    assert [column.dtype for column in numbers] == [np.float64] * 2


def test_order_of_images_and_rows_does_not_matter(frame: pd.DataFrame) -> None:
    shuffled = frame.sample(frac=1, random_state=0)
    keys = ["dataset", "attention", "readout"]
    expected, found = (summarise(rows).sort_values(keys).reset_index(drop=True) for rows in (frame, shuffled))
    pd.testing.assert_frame_equal(found, expected)


def test_what_was_not_measured_is_one_line(frame: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"no rows of attention 'vanilla': measured were \['csa', 'identity'\]"):
        compare(frame, "csa", "vanilla")
    with pytest.raises(ValueError, match="no column 'gain' to compare by: expected some of model, dataset"):
        compare(frame, {"gain": "2"}, "csa")
    fewer = frame[(frame["attention"] != "csa") | (frame["image"] != "0")]
    with pytest.raises(ValueError, match="csa has 2 images, identity 3: expected the same ones"):
        compare(fewer, "csa", "identity")


def test_cells_that_differ_in_several_columns_are_compared(frame: pd.DataFrame) -> None:
    table = summarise(frame).set_index(["attention", "readout", "dataset"])["miou"].sort_index()
    a, b = {"attention": "csa", "readout": "bare"}, {"attention": "identity", "readout": "full"}
    found = compare(frame, a, b).set_index("dataset")
    assert found["difference"].to_dict() == pytest.approx((table["csa", "bare"] - table["identity", "full"]).to_dict())
    assert set(zip(found["a"], found["b"], strict=True)) == {("csa, bare", "identity, full")}
    assert "readout" not in found
    assert "protocol" in found


def test_an_interval_is_paired(frame: pd.DataFrame) -> None:
    one = frame[frame["dataset"].eq("scenes-things") & frame["readout"].eq("full")]
    tables = {
        name: part.pivot(index="image", columns="class", values=["intersection", "predicted", "true"]).to_numpy()
        for name, part in one.groupby("attention", observed=True)
    }
    generator, drawn = np.random.default_rng(1), []
    for _ in range(4000):
        chosen = generator.integers(3, size=3)
        mious = []
        for name in ("csa", "identity"):
            hit, predicted, true = tables[name][chosen].sum(axis=0).reshape(3, -1)
            union = predicted + true - hit
            mious.append(100 * np.mean(hit[union > 0] / union[union > 0]))
        drawn.append(mious[0] - mious[1])
    expected = np.quantile(drawn, [0.025, 0.975])
    found = compare(one, "csa", "identity").iloc[0]
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.5)


def test_numbers_are_written_with_their_interval() -> None:
    numbers = {"low": [9.96, -1.0], "high": [11.04, 0.25]}
    assert list(written(pd.DataFrame(numbers | {"miou": [10.25, -0.5]}))) == ["10.2 [10.0, 11.0]", "-0.5 [-1.0, 0.2]"]
    assert list(written(pd.DataFrame(numbers | {"difference": [10.0, 0.0]}))) == [
        "10.0 [10.0, 11.0]",
        "0.0 [-1.0, 0.2]",
    ]


def test_a_stored_name_that_nobody_registered_and_a_callable_are_compared(frame: pd.DataFrame) -> None:
    def mine(site):
        raise NotImplementedError

    renamed = frame.astype({"attention": str}).replace({"attention": {"csa": "mine"}})
    expected = compare(frame, "csa", "identity")["difference"].tolist()
    for a in ("mine", mine, {"attention": mine}):
        found = compare(renamed, a, "identity")
        assert found["difference"].tolist() == expected
        assert set(found["a"]) == {"mine"}
