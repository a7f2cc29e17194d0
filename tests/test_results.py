"""The stored results: what this code measures with this model, and no cell half measured."""

import re

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from sclip_lab import Protocol, datasets, load, sweep
from sclip_lab.files import home
from sclip_lab.later import repaired
from sclip_lab.refine import Pamr
from sclip_lab.store import CELL, COUNTS, HEAD, read

TABLES = sorted((home() / "data" / "results").glob("*.parquet"))
STORED = [path for path in TABLES if set(HEAD + COUNTS) <= set(pq.read_schema(path).names)]  # of sweeps


@pytest.fixture(params=STORED, ids=lambda path: path.stem)
def stored(request):
    return read(request.param)


def test_every_cell_of_a_dataset_has_the_same_images(stored):
    heads = stored[HEAD].drop_duplicates()
    images = heads.groupby(["dataset", "layers"], observed=True)["image"].nunique()
    per_cell = heads.groupby(CELL, observed=True)["image"].nunique().reset_index()
    assert all(row.image == images[row.dataset, row.layers] for row in per_cell.itertuples())


def test_a_sample_is_measured_again(stored):
    cells = stored[CELL].drop_duplicates()
    known = cells["dataset"].isin(datasets().index) & ~cells["attention"].isin(["uniform"])
    cells = cells[known].sample(4, random_state=0)
    tiny = load("tiny")
    models = {model.name: model for model in (tiny, repaired(tiny))}
    for cell in cells.itertuples():
        layers = tuple(map(int, cell.layers.split(",")))
        short_side, *windows = cell.protocol.replace("whole", "0").split("/")
        protocol = Protocol(int(short_side), *map(int, windows))
        refine = None
        if found := re.search(r"pamr\((\d+)/([\d,]+)\)", cell.labelling):
            refine = Pamr(int(found[1]), tuple(map(int, found[2].split(","))))
        found = sweep(
            models[cell.model], cell.dataset, cell.attention, protocol, cell.readout, [layers], limit=1, refiners=refine
        )
        assert found[CELL].iloc[0].astype(str).tolist() == list(cell[1:])
        expected = pd.merge(stored, pd.DataFrame([cell[1:]], columns=CELL).assign(image="0"), on=HEAD)
        found, expected = (rows.set_index("class")[COUNTS].sort_index() for rows in (found, expected))
        # Other processors and thread counts round otherwise; a pixel here and there may take another name.
        assert np.abs(found - expected).to_numpy().sum() <= 0.002 * expected["true"].sum()


def test_there_are_results():
    assert STORED


@pytest.fixture
def published():
    return pd.read_csv(home() / "data" / "paper.csv")


def test_published_numbers_say_how_sure_they_are(published):
    sure = {"published", "second-hand", "second-hand, sources agree", "derived", "memory, unverified"}
    assert set(published["status"]) == sure
    assert published["source"].notna().all()
    assert not published.duplicated(["table", "method", "dataset", "protocol", "attention", "readout"]).any()


def test_published_averages_are_those_of_eight_benchmarks(published):
    main = published[published["table"].fillna(1).eq(1) & published["dataset"].ne("coco-stuff-10k")]
    averaged = main["method"].isin(main.loc[main["dataset"] == "average", "method"])
    wide = main[averaged].pivot(index="method", columns="dataset", values="miou").dropna()
    assert {"CLIP", "MaskCLIP", "ReCo", "GroupViT", "TCL", "SCLIP"} < set(wide.index)
    assert wide.shape[1] == 9
    average = wide.pop("average")
    np.testing.assert_allclose(wide.mean(axis=1), average, atol=0.07)  # printed with one decimal, cut or rounded
