"""An invoice's PDF says what its JSON says: read back with a PDF reader that knows nothing of us."""

import json
import os
import re

import pypdf

with open(os.environ["SLUICE_INVOICE_JSON"], encoding="utf-8") as file:
    INVOICE = json.load(file)
READER = pypdf.PdfReader(os.environ["SLUICE_INVOICE_PDF"])
TEXT = "\n".join(page.extract_text() for page in READER.pages)


def squeezed(text):
    return re.sub(r"\s+", "", text)


def test_names_numbers_and_addresses_are_there():
    assert READER.metadata.title == f"{INVOICE['kind']} {INVOICE['number']}"
    customer = INVOICE["customer"]
    for said in [INVOICE["number"], INVOICE["account"], INVOICE["period"], customer["name"], *customer["address"]]:
        assert squeezed(said) in squeezed(TEXT), said
    assert any(ord(character) > 0xFF for character in customer["name"]), "a name beyond Latin-1 is tested"


def test_every_line_and_its_amount_is_there():
    rows = iter(TEXT.splitlines())
    for line in INVOICE["lines"]:
        described = squeezed(line["description"])
        row = next((row for row in rows if squeezed(row).startswith(described)), None)
        assert row is not None, f"no line {line['description']} in\n{TEXT}"
        assert row.split()[-1] == line["amount"], row


def test_the_total_is_what_is_due():
    (due,) = re.findall(r"^Amount due USD\s+(\S+)$", TEXT, re.MULTILINE)
    assert due == INVOICE["totals"]["due"]
