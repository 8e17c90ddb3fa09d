"""Clean prose from packages with free licences, into DATA/corpus/*.txt, one paragraph a line.

Downloads each package with its ordinary client (apt-get, pip), unpacks it without installing it, and keeps sentences only:
no code, tables or menus. Licences and sizes of what came out are in ../models/sluice-demo/README.md.
"""

import argparse
import glob
import html
import json
import re
import subprocess
import zipfile
from pathlib import Path

# Debian package -> HTML files in it. PSF, public domain, PostgreSQL, BSD, MIT/Apache-2.0, Apache-2.0, MIT, public domain.
DOCUMENTATION = {
    "python3.11-doc": ["**/*.html"],
    "sqlite3-doc": ["**/*.html"],
    "postgresql-doc-15": ["**/*.html"],
    "python-django-doc": ["**/*.html"],
    "rust-doc": [f"usr/share/doc/rust-doc/html/{book}/**/*.html" for book in ("book", "nomicon", "reference", "cargo")],
    "apache2-doc": ["**/en/**/*.html", "**/*.html.en"],
    "nodejs-doc": ["**/*.html"],
    "docutils-doc": ["**/*.html"],
}
WORDNET = "wordnet-base"
CHITCHAT = "chitchat-dataset==0.9.0"

DROPPED = re.compile(r"<(script|style|nav|head|pre|table|svg|form|footer)\b.*?</\1\s*>", re.S | re.I)
BLOCK = re.compile(r"</?(p|li|dd|dt|h[1-6]|div|br|blockquote|ul|ol|dl|section|article|td|tr)\b[^>]*>", re.I)
TAG = re.compile(r"<[^>]+>")
UNFIT = re.compile(
    r"\b(fuck\w*|shit\w*|bitch\w*|cunt|nigg\w*|fag\w*|rape\w*|porn\w*|sex\w*|dick|pussy|asshole|kill\w*|suicid\w*)\b"
    r"|https?://|@\w+|\d{3}[- ]\d{3,4}",
    re.I,
)


def paragraphs(page: str) -> list[str]:
    page = re.sub(r"\s+", " ", DROPPED.sub("\n", page))
    page = html.unescape(TAG.sub("", BLOCK.sub("\n", page)))
    return [re.sub(r"[ \u00b6]+", " ", line).strip() for line in page.split("\n")]


def is_prose(line: str) -> bool:
    letters = sum(char.isalpha() or char == " " for char in line)
    return len(line.split()) >= 7 and line[-1] in '.!?:)"' and letters > 0.8 * len(line)


def fetch(data: Path) -> None:
    downloads, unpacked = data / "downloads", data / "x"
    downloads.mkdir(parents=True, exist_ok=True)
    for package in (*DOCUMENTATION, WORDNET):
        if (unpacked / package).is_dir():
            continue
        subprocess.run(["apt-get", "download", package], cwd=downloads, check=True)
        (archive,) = downloads.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, unpacked / package], check=True)
    if not (unpacked / "chitchat").is_dir():
        subprocess.run(["pip", "download", "--no-deps", "-d", downloads, CHITCHAT], check=True)
        (archive,) = downloads.glob("chitchat*.whl")
        with zipfile.ZipFile(archive) as files:
            files.extractall(unpacked / "chitchat")


def extract_documentation(data: Path, package: str, patterns: list[str]) -> None:
    root, seen = data / "x" / package, set()
    with open(data / "corpus" / f"{package}.txt", "w") as out:
        for pattern in patterns:
            for path in sorted(glob.glob(f"{root}/{pattern}", recursive=True)):
                if not Path(path).is_file():
                    continue
                page = Path(path).read_text(errors="ignore")
                for line in paragraphs(page):
                    if line and line not in seen and is_prose(line):
                        seen.add(line)
                        out.write(line + "\n")


def extract_chitchat(data: Path) -> None:
    """Conversations of at least four turns, one a line, turns split by tabs; unfit ones left out."""
    (source,) = (data / "x" / "chitchat").glob("**/dataset.json")
    with open(data / "corpus" / "chitchat.txt", "w") as out:
        for conversation in json.loads(source.read_text()).values():
            turns = [" ".join(part["text"].strip() for part in turn) for turn in conversation["messages"]]
            turns = [re.sub(r"\s+", " ", turn) for turn in turns if turn.strip()]
            odd = any(0x2100 < ord(char) < 0x3000 or ord(char) > 0xFFFF for turn in turns for char in turn)
            if len(turns) >= 4 and not odd and not any(UNFIT.search(turn) for turn in turns):
                out.write("\t".join(turns) + "\n")


def extract_wordnet(data: Path) -> None:
    """One JSON list a line: word, kind, definition, examples."""
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    with open(data / "corpus" / "wordnet.txt", "w") as out:
        for kind, name in kinds.items():
            path = data / "x" / WORDNET / f"usr/share/wordnet/data.{kind}"
            for line in path.read_text(encoding="latin1").splitlines():
                if line.startswith("  ") or " | " not in line:
                    continue
                fields, gloss = line.split(" | ", 1)
                word = fields.split()[4].replace("_", " ")
                definition = gloss.strip().split('; "')[0]
                out.write(json.dumps([word, name, definition, re.findall(r'"([^"]+)"', gloss)]) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="folder for downloads and corpus (about 1 GB)")
    data = arguments.parse_args().data.resolve()
    fetch(data)
    (data / "corpus").mkdir(exist_ok=True)
    for package, patterns in DOCUMENTATION.items():
        extract_documentation(data, package, patterns)
    extract_chitchat(data)
    extract_wordnet(data)
    for path in sorted((data / "corpus").glob("*.txt")):
        print(f"{path.name:24} {path.stat().st_size / 1e6:7.2f} MB")


if __name__ == "__main__":
    main()
