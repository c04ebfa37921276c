"""Retrieval collections: documents, queries and judgements, from a registry, or from a folder in the layout of BEIR.

`icd10` is the tabular list of ICD-10-CM: a document is a code's description, a query an inclusion term ("Botulism
NOS"), and relevant are the codes that list it. A folder holds `corpus.jsonl` (`_id`, `title`, `text`),
`queries.jsonl` (`_id`, `text`), `qrels/train.tsv` and `qrels/test.tsv` (`query-id`, `corpus-id`, `score`; above 0 is
relevant), and, where there is one, `qrels/dev.tsv`.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from samplewise.loaders.ragged import Ragged
from samplewise.recipes.assets import ASSETS, origin, resolve
from samplewise.recipes.data import DataError

TEST, VALIDATION = 0.2, 0.1
"""Shares of the queries, where a collection names no parts itself."""


@dataclass(frozen=True)
class Queries:
    """Queries with their judgements.

    Attributes:
        ids: their names.
        texts: the queries themselves.
        positives: for each one the rows of its relevant documents, at least one.
    """

    ids: list[str]
    texts: list[str]
    positives: Ragged

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Collection:
    """What there is to retrieve.

    Attributes:
        name: as the report calls it.
        source: where it came from, in words.
        document_ids, documents: names and texts.
        train, validation, test: the queries; no text is in two parts.
    """

    name: str
    source: str
    document_ids: list[str]
    documents: list[str]
    train: Queries
    validation: Queries
    test: Queries


def load_collection(data: str, *, documents: int = 0, say: Callable[[str], None] = print) -> Collection:
    """Find and read a collection, and part its queries.

    Args:
        data: a name in `ASSETS` ("icd10"), or a folder in one of the module's layouts.
        documents: of ICD-10-CM, so many codes: all that have queries, then siblings of those; 0 takes all 46,881.
        say: gets a line on each source tried.

    Raises:
        AssetError: it could not be had; the message lists what was tried.
        DataError: a folder whose files are not understood.
    """
    if data in ASSETS:
        folder = resolve(data, say=say)
        name, source = data, origin(folder)
    else:
        folder = Path(data)
        name, source = folder.resolve().name, f"the folder {data}"
    xml = next(iter(sorted(folder.glob("icd10c*-tabular*.xml"))), None)
    if xml is not None:
        return _icd10(xml, name, source, documents)
    if (folder / "corpus.jsonl").is_file():
        return _beir(folder, name, source)
    raise DataError(
        f"data={data!r}: neither {', '.join(sorted(ASSETS))} nor a folder with corpus.jsonl, queries.jsonl and qrels/ "
        f"(or the XML of ICD-10-CM); see samplewise.recipes.corpus"
    )


def place(text: str) -> float:
    """Where a text falls in [0, 1): by its hash, so that the parts stay the same when texts are added.

    >>> place("Botulism NOS") == place("botulism nos")
    True
    """
    return int.from_bytes(hashlib.sha256(text.casefold().encode()).digest()[:8], "big") / 2**64


# --- ICD-10-CM --------------------------------------------------------------------------------------------------------


def _icd10(path: Path, name: str, source: str, wanted: int) -> Collection:
    try:
        tree = ElementTree.parse(path)
    except ElementTree.ParseError as error:
        raise DataError(f"data={str(path)!r}: cannot be read: {error}") from error
    codes, families, terms = _read_codes(tree.getroot())
    kept = _with_siblings(codes, families, {code for _, code in terms}, wanted)
    same: dict[str, list[int]] = defaultdict(list)  # a description that stands at several codes is as relevant at each
    for row, code in enumerate(kept):
        same[codes[code].casefold()].append(row)
    relevant: dict[str, tuple[str, set[int]]] = {}
    for term, code in terms:
        relevant.setdefault(term.casefold(), (term, set()))[1].update(same[codes[code].casefold()])
    parts: dict[str, list[tuple[str, str, list[int]]]] = {"train": [], "validation": [], "test": []}
    for number, (term, rows) in enumerate(relevant.values()):
        parts[_part(term)].append((f"t{number}", term, sorted(rows)))
    queries = {part: _queries(rows) for part, rows in parts.items()}
    return Collection(name, source, kept, [codes[code] for code in kept], **queries)


def _read_codes(root: ElementTree.Element) -> tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]:
    """Description and parent of each code, and the inclusion terms with theirs."""
    codes, families, terms = {}, {}, []
    stack = [(entry, section.get("id", "")) for section in root.iter("section") for entry in section.findall("diag")]
    stack.reverse()
    while stack:
        entry, parent = stack.pop()
        code = entry.findtext("name", "")
        codes[code], families[code] = _clean(entry.findtext("desc", "")), parent
        terms += [(_clean(note.text or ""), code) for note in entry.findall("inclusionTerm/note")]
        stack += [(child, code) for child in reversed(entry.findall("diag"))]
    return codes, families, terms


def _with_siblings(codes: Iterable[str], families: Mapping[str, str], queried: set[str], wanted: int) -> list[str]:
    """The codes with queries and, up to `wanted` in all, siblings of them; in the order of the list. 0: all codes."""
    if not wanted:
        return list(codes)
    parents = {families[code] for code in queried}
    siblings = [code for code in codes if code not in queried and families[code] in parents]
    kept = queried | set(sorted(siblings, key=place)[: max(0, wanted - len(queried))])
    return [code for code in codes if code in kept]


def _clean(text: str) -> str:
    return " ".join(text.split())


def _part(text: str) -> str:
    where = place(text)
    return "test" if where < TEST else "validation" if where < TEST + VALIDATION else "train"


def _queries(rows: Sequence[tuple[str, str, Sequence[int]]]) -> Queries:
    return Queries([row[0] for row in rows], [row[1] for row in rows], Ragged.from_lists([row[2] for row in rows]))


# --- BEIR -------------------------------------------------------------------------------------------------------------


def _beir(folder: Path, name: str, source: str) -> Collection:
    corpus = list(_jsonl(folder / "corpus.jsonl"))
    texts = {entry["_id"]: entry["text"] for entry in _jsonl(folder / "queries.jsonl")}
    rows = {entry["_id"]: row for row, entry in enumerate(corpus)}
    judged = {part: _qrels(folder / "qrels" / f"{part}.tsv", texts, rows) for part in ("test", "dev", "train")}
    if not judged["dev"]:  # some of the training queries, always the same ones
        judged["dev"] = {query: docs for query, docs in judged["train"].items() if place(texts[query]) < VALIDATION}
    parts, seen = {}, set[str]()
    for part, relevant in judged.items():  # a text that is tested is not trained on, whatever its id
        fresh = {query: docs for query, docs in relevant.items() if texts[query].casefold() not in seen}
        parts[part] = _queries([(query, texts[query], docs) for query, docs in fresh.items()])
        seen.update(texts[query].casefold() for query in fresh)
    if not len(parts["train"]) or not len(parts["test"]):
        raise DataError(f"data={str(folder)!r}: qrels/train.tsv and qrels/test.tsv must both name relevant documents")
    documents = [_clean(f"{entry.get('title', '')} {entry['text']}") for entry in corpus]
    return Collection(
        name, source, list(rows), documents, train=parts["train"], validation=parts["dev"], test=parts["test"]
    )


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"data={str(path.parent)!r}: needs {path.name} beside the other files")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                yield {**entry, "_id": str(entry["_id"]), "text": str(entry["text"])}
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f'{path}:{number}: not a line {{"_id": ..., "text": ...}}: {error!r}') from error


def _qrels(path: Path, queries: Mapping[str, str], rows: Mapping[str, int]) -> dict[str, list[int]]:
    """The relevant documents' rows of each judged query, in the order of the file; {} where there is none."""
    relevant: dict[str, list[int]] = {}
    if not path.is_file():
        return relevant
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            fields = line.split("\t")
            if number == 1 and not fields[-1].strip().lstrip("-").isdigit():  # the header
                continue
            if not line.strip():
                continue
            try:
                query, document, score = fields[0], fields[1], int(fields[2])
                if score > 0 and queries[query] is not None:
                    relevant.setdefault(query, []).append(rows[document])
            except (ValueError, IndexError) as error:
                raise DataError(f"{path}:{number}: not `query-id TAB corpus-id TAB score`: {line.strip()!r}") from error
            except KeyError as error:
                raise DataError(f"{path}:{number}: {error} is in neither queries.jsonl nor corpus.jsonl") from None
    return {query: sorted(set(docs)) for query, docs in relevant.items()}


def judgements(queries: Queries, document_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """What evaluation libraries call qrels: query -> document -> 1."""
    rows = (queries.positives[row] for row in range(len(queries)))
    return {
        query: {document_ids[row]: 1 for row in relevant.tolist()}
        for query, relevant in zip(queries.ids, rows, strict=True)
    }
