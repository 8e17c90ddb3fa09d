"""What finance teams read exports with: pyarrow, the csv module, DuckDB's SQL. Sums are exact, floats are nowhere."""

import csv
import json
import os
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

EXPORTS = Path(os.environ["SLUICE_EXPORTS"])
# What `sluice usage` says was billed.
USAGE = json.loads(os.environ["SLUICE_LEDGER_USAGE"])
COST = sum(Decimal(row["cost"]) for row in USAGE)
REQUESTS = sum(row["requests"] for row in USAGE)
FOCUS = ["focus-1.2", "focus-1.4"]
EXACT = pa.decimal128(38, 12)


def parts(dataset, form):
    found = sorted((EXPORTS / f"{dataset}-{form}").glob(f"{dataset}-*.{form}"))
    assert found
    return found


def table(dataset):
    return pa.concat_tables(pq.read_table(part) for part in parts(dataset, "parquet"))


def csv_rows(dataset):
    rows = []
    for part in parts(dataset, "csv"):
        with open(part, newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


@pytest.mark.parametrize("dataset", ["usage", "cost"])
def test_parquet_sums_to_the_ledger(dataset):
    rows = table(dataset)
    assert rows.schema.field("cost").type == EXACT
    assert rows.schema.field("admitted_at").type == pa.timestamp("ms", tz="UTC")
    assert pc.sum(rows["cost"]).as_py() == COST
    assert len(pc.unique(rows["request_id"])) == REQUESTS


def test_every_line_is_its_price_for_each_unit_begun():
    for row in table("cost").to_pylist():
        assert -(-row["quantity"] // row["unit_size"]) * row["unit_price"] == row["cost"], row


def test_duckdb_sums_to_the_ledger():
    folder = EXPORTS / "usage-parquet"
    [(cost, requests)] = duckdb.sql(f"SELECT sum(cost), count(*) FROM '{folder}/*.parquet'").fetchall()
    assert (cost, requests) == (COST, REQUESTS)


@pytest.mark.parametrize("dataset", ["usage", "cost"])
def test_all_formats_say_the_same(dataset):
    lines = [json.loads(line) for part in parts(dataset, "jsonl") for line in open(part, encoding="utf-8")]
    rows = csv_rows(dataset)
    columns = table(dataset).to_pylist()
    assert len(lines) == len(rows) == len(columns)
    for line, row, column in zip(lines, rows, columns):
        assert Decimal(line["cost"]) == Decimal(row["cost"]) == column["cost"]
        assert line["request_id"] == row["request_id"] == column["request_id"]
        assert line["sequence"] == int(row["sequence"]) == column["sequence"]
        moment = column["admitted_at"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
        assert line["admitted_at"] == row["admitted_at"] == moment


@pytest.mark.parametrize("dataset", FOCUS)
def test_focus_costs_add_up(dataset):
    rows = table(dataset)
    for column in ["BilledCost", "EffectiveCost", "ListCost", "ContractedCost", "PricingQuantity", "ListUnitPrice"]:
        assert rows.schema.field(column).type == EXACT, column
    assert pc.sum(rows["EffectiveCost"]).as_py() == COST
    csv_sum = sum(Decimal(row["EffectiveCost"]) for row in csv_rows(dataset))
    assert csv_sum == COST
    for row in rows.to_pylist():
        assert row["ListUnitPrice"] * row["PricingQuantity"] == row["ListCost"], row
        assert row["ContractedUnitPrice"] * row["PricingQuantity"] == row["ContractedCost"], row
        assert json.loads(row["Tags"] or "{}") is not None
        if row["ChargeCategory"] == "Purchase":
            assert row["EffectiveCost"] == 0 < row["BilledCost"]
        else:
            assert row["BilledCost"] == 0, "prepaid usage was billed by the purchase"


def test_the_versions_of_focus_differ_in_who_provides():
    names = {version: set(table(version).schema.names) for version in FOCUS}
    assert names["focus-1.2"] - names["focus-1.4"] == {"ProviderName", "PublisherName"}
    assert names["focus-1.4"] - names["focus-1.2"] == {"HostProviderName", "InvoiceDetailId", "ServiceProviderName"}
