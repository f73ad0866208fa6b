"""Gather clean English prose from Debian documentation packages.

    python launch/nano/gather.py --out data/nano

Downloads each package named in sources.py with `apt-get download` (nothing is installed), unpacks
it, keeps prose paragraphs, and writes train.jsonl, heldout.jsonl ({"text", "source"} a line) and
MANIFEST.json (package, version, licences, bytes, SHA-256). The same package versions give the
same bytes. Needs apt-get, dpkg-deb and xz.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import clean
import extract
import sources

HELDOUT_PER_MILLE = 14
NGRAM = 13


def download(package: str, folder: pathlib.Path) -> pathlib.Path | None:
    """Path of the package's .deb in `folder`, fetched if absent; None if the archive lacks it."""
    have = sorted(folder.glob(f"{package}_*.deb"))
    if have:
        return have[-1]
    done = subprocess.run(
        ["apt-get", "download", "-qq", package], cwd=folder, capture_output=True, text=True
    )
    have = sorted(folder.glob(f"{package}_*.deb"))
    if done.returncode or not have:
        print(f"gather: {package}: not available ({done.stderr.strip()[:120]})", file=sys.stderr)
        return None
    return have[-1]


def licences(root: pathlib.Path, package: str) -> list[str]:
    """Short licence names that the package's debian/copyright states."""
    path = root / "usr/share/doc" / package / "copyright"
    if not path.exists():
        found = sorted(root.glob("usr/share/doc/*/copyright"))
        if not found:
            return []
        path = found[0]
    text = path.read_text(errors="replace")
    names = {m.strip() for m in re.findall(r"(?mi)^Licen[sc]e:[ \t]*(\S[^\n]*)", text)}
    # some files put whole sentences in the field; a name is short
    names = {
        n for n in names if len(n.split()) < 8 and not re.search(r"(?i)permission|copy|by obt", n)
    }
    if not names:
        known = {
            "GPL": r"general public licen[sc]e|GNU GPL", "LGPL": r"lesser general public",
            "GFDL": r"free documentation licen[sc]e", "BSD": r"redistribution and use in source",
            "MIT": r"permission is hereby granted, free of charge", "PSF": r"python software found",
            "Apache-2.0": r"apache licen[sc]e", "public-domain": r"public domain",
            "Artistic": r"artistic licen[sc]e", "CC-BY-SA": r"attribution-share ?alike",
            "OPL": r"open publication licen[sc]e", "MPL": r"mozilla public licen[sc]e",
            "permissive (as stated)": r"permission to use, copy, modify|permission is granted to",
        }  # fmt: skip
        names = {name for name, pattern in known.items() if re.search(pattern, text, re.I)}
    return sorted(names)[:12]


def section(deb: pathlib.Path) -> dict[str, str]:
    """Control fields of a .deb."""
    out = subprocess.run(["dpkg-deb", "-f", str(deb)], capture_output=True, text=True, check=True)
    return dict(re.findall(r"(?m)^(\w[\w-]*): (.*)$", out.stdout))


def read_package(job: tuple[str, str, float]) -> tuple[dict, list[tuple[str, list]]]:
    """Manifest entry and (path, blocks) of every readable file of one package."""
    package, deb, cap = job
    fields = section(pathlib.Path(deb))
    entry = {
        "package": package,
        "version": fields["Version"],
        "section": fields.get("Section", ""),
        "deb_sha256": hashlib.sha256(pathlib.Path(deb).read_bytes()).hexdigest(),
    }
    other = re.compile(
        rf"(?:/|[._-])(?:{sources.LANGUAGES})(?:[-_@][A-Za-z]+)?(?:/|\.html|\.xml|\.txt|\.gz|$)"
    )
    skip = re.compile(sources.SKIP_PATHS)
    only = re.compile(sources.ONLY.get(package, ""))
    files, size = [], 0
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        entry["licences"] = licences(root, package)
        # past its cap a package gives a sample of its files, chosen by name hash
        names = {"/" + str(path.relative_to(root)): path for path in root.glob("usr/**/*")}
        for name in sorted(names, key=lambda n: hashlib.blake2b(n.encode()).digest()):
            path = names[name]
            if size > cap * 1.4e6:
                break
            if path.is_symlink() or not path.is_file() or path.stat().st_size > 12 << 20:
                continue
            if other.search(name) or skip.search(name) or not only.search(name):
                continue
            try:
                blocks = extract.read_blocks(path)
            except (OSError, EOFError, ValueError) as fault:
                print(f"gather: {package}{name}: {fault}", file=sys.stderr)
                continue
            blocks = clean.prose_blocks(blocks)
            if blocks:
                files.append((name, blocks))
                size += sum(len(text) for _, text in blocks)
    return entry, files


def is_heldout(source: str) -> bool:
    """Whether a document, by the hash of its name, is held out."""
    return int.from_bytes(hashlib.blake2b(source.encode()).digest()[:4], "big") % 1000 < (
        HELDOUT_PER_MILLE
    )


def ngrams(text: str) -> set[int]:
    """Hashes of a text's runs of 13 lower-case words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + NGRAM])) for i in range(len(words) - NGRAM + 1)}


def drop_shared(heldout: list[dict], train: list[dict]) -> list[dict]:
    """Held-out documents less every paragraph that shares 13 words in a row with the train text."""
    grams = set()
    for record in heldout:
        grams |= ngrams(record["text"])
    shared: set[int] = set()
    for record in train:
        shared |= ngrams(record["text"]) & grams
    kept = []
    for record in heldout:
        parts = [p for p in record["text"].split("\n\n") if not ngrams(p) & shared]
        text = "\n\n".join(parts)
        if len(text) >= 600:
            kept.append({**record, "text": text})
    return kept


def write_jsonl(path: pathlib.Path, records: list[dict]) -> str:
    """Write records beside and rename; returns the SHA-256 of the file."""
    body = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    partial = path.with_suffix(".partial")
    partial.write_bytes(body)
    os.replace(partial, path)
    return hashlib.sha256(body).hexdigest()


def main() -> None:
    """Run the whole gathering."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--packages", default="", help="only these, separated by commas")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    debs = args.out / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    wanted = {k: v for k, v in sources.PACKAGES.items() if v > 0}
    if args.packages:
        wanted = {k: wanted.get(k, 8.0) for k in args.packages.split(",")}
    jobs = []
    for package, cap in wanted.items():
        deb = download(package, debs)
        if deb:
            jobs.append((package, str(deb), cap))

    seen: set[bytes] = set()
    train, heldout, entries = [], [], []
    with multiprocessing.Pool(args.processes) as pool:
        for (package, _, cap), (entry, files) in zip(
            jobs, pool.imap(read_package, jobs), strict=True
        ):
            if entry["section"].startswith(("non-free", "contrib")) or not entry["licences"]:
                print(f"gather: {package}: no clear free licence, left out", file=sys.stderr)
                continue
            size, chosen = 0, []
            for name, blocks in files:
                if size > cap * 1e6:
                    break
                text = clean.document(blocks, seen)
                if text:
                    size += len(text)
                    chosen.append({"text": text, "source": f"{package}:{name}"})
            for record in sorted(chosen, key=lambda r: r["source"]):
                (heldout if is_heldout(record["source"]) else train).append(record)
            entries.append({**entry, "documents": len(chosen), "bytes": size})
            print(f"{package:28s} {len(chosen):6d} documents {size / 1e6:8.2f} MB", flush=True)

    heldout = drop_shared(heldout, train)
    manifest = {"packages": entries, "files": {}}
    for name, records in (("train", train), ("heldout", heldout)):
        path = args.out / f"{name}.jsonl"
        digest = write_jsonl(path, records)
        text = "\n\n".join(r["text"] for r in records).encode()
        manifest["files"][path.name] = {
            "sha256": digest,
            "documents": len(records),
            "text_bytes": len(text),
        }
        if name == "heldout" and text:
            packed = len(lzma.compress(text, preset=9))
            manifest["files"][path.name]["xz9_bits_per_byte"] = round(8 * packed / len(text), 4)
    body = json.dumps(manifest, indent=1) + "\n"
    (args.out / "MANIFEST.json").write_text(body)
    print(json.dumps(manifest["files"], indent=1))


if __name__ == "__main__":
    main()
