"""Collections: ICD-10-CM's XML, folders in the layout of BEIR, and how queries are parted."""

import json

import pytest
from retrieval_support import write_collection

from samplewise.recipes.assets import AssetError
from samplewise.recipes.corpus import TEST, VALIDATION, judgements, load_collection, place
from samplewise.recipes.data import DataError

XML = """<ICD10CM.tabular><chapter><section id="A00-A09">
<diag><name>A00</name><desc>Cholera</desc>
  <diag><name>A00.0</name><desc>Classical   cholera</desc>
    <inclusionTerm><note>Asiatic cholera</note><note>Plague of  rice</note></inclusionTerm></diag>
  <diag><name>A00.1</name><desc>Cholera eltor</desc></diag>
  <diag><name>A00.2</name><desc>Cholera of another kind</desc></diag>
</diag></section><section id="B00-B09">
<diag><name>B01</name><desc>classical cholera</desc><inclusionTerm><note>ASIATIC CHOLERA</note></inclusionTerm></diag>
<diag><name>B02</name><desc>Herpes</desc><inclusionTerm><note>Asiatic Cholera</note></inclusionTerm>
  <diag><name>B02.1</name><desc>Herpes of the eye</desc></diag></diag>
</section></chapter></ICD10CM.tabular>"""


@pytest.fixture
def icd(tmp_path):
    (tmp_path / "icd10c-tabular-2026.xml").write_text(XML)
    return str(tmp_path)


def all_queries(collection):
    return {
        text: [collection.document_ids[row] for row in part.positives[number]]
        for part in (collection.train, collection.validation, collection.test)
        for number, text in enumerate(part.texts)
    }


def test_icd_codes_are_documents_and_terms_are_queries(icd):
    collection = load_collection(icd)
    assert collection.document_ids == ["A00", "A00.0", "A00.1", "A00.2", "B01", "B02", "B02.1"]
    assert collection.documents[1] == "Classical cholera"
    # a term that stands at several codes is one query; a code of the same description is as relevant
    assert all_queries(collection) == {"Asiatic cholera": ["A00.0", "B01", "B02"], "Plague of rice": ["A00.0", "B01"]}


@pytest.mark.parametrize(("wanted", "count"), [(0, 7), (1, 3), (4, 4), (5, 5), (100, 5)])
def test_icd_keeps_queried_codes_then_their_siblings(icd, wanted, count):
    collection = load_collection(icd, documents=wanted)
    kept = collection.document_ids
    assert len(kept) == count
    assert {"A00.0", "B01", "B02"} <= set(kept)
    if wanted:
        assert set(kept) <= {"A00.0", "A00.1", "A00.2", "B01", "B02"}
    assert kept == sorted(kept)
    assert load_collection(icd, documents=wanted).document_ids == kept  # the same ones every time


def test_parts_go_by_the_text(tmp_path):
    terms = [f"term {number}" for number in range(2000)]
    notes = "".join(f"<note>{term}</note>" for term in terms)
    (tmp_path / "icd10c-tabular.xml").write_text(
        f"<t><section id='X'><diag><name>X1</name><desc>d</desc><inclusionTerm>{notes}</inclusionTerm></diag>"
        f"</section></t>"
    )
    collection = load_collection(str(tmp_path))
    assert collection.test.texts == [term for term in terms if place(term) < TEST]
    assert collection.validation.texts == [term for term in terms if TEST <= place(term) < TEST + VALIDATION]
    assert sorted(all_queries(collection)) == sorted(terms)
    assert len(collection.test) == pytest.approx(2000 * TEST, abs=4 * (2000 * TEST * (1 - TEST)) ** 0.5)
    assert len(collection.validation) == pytest.approx(
        2000 * VALIDATION, abs=4 * (2000 * VALIDATION * (1 - VALIDATION)) ** 0.5
    )


def test_beir_folder(tmp_path):
    collection = load_collection(str(write_collection(tmp_path / "fruit")))
    assert (collection.name, len(collection.documents)) == ("fruit", 64)
    assert collection.documents[:2] == ["red apple", "red boat"]
    assert [len(part) for part in (collection.train, collection.validation, collection.test)] == [40, 8, 16]
    found = all_queries(collection)
    assert found["boat that is red"] == ["d1"]  # a judgement of 0 is none
    assert found["apple that is red"] == ["d0", "d1"]
    first = judgements(collection.test, collection.document_ids)
    assert set(first) == set(collection.test.ids)
    assert all(set(relevant.values()) == {1} for relevant in first.values())


def test_beir_without_dev_takes_some_training_queries(tmp_path):
    folder = write_collection(tmp_path)
    (folder / "qrels/dev.tsv").unlink()
    collection = load_collection(str(folder))
    assert len(collection.train) + len(collection.validation) == 40
    assert all(place(text) < VALIDATION for text in collection.validation.texts)
    assert all(place(text) >= VALIDATION for text in collection.train.texts)


def test_a_tested_text_is_not_trained_on(tmp_path):
    folder = write_collection(tmp_path)
    tested = load_collection(str(folder)).test.texts[0]
    with (folder / "queries.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "copy", "text": tested.upper()}) + "\n")
    with (folder / "qrels/train.tsv").open("a") as file:
        file.write("copy\td0\t1\n")
    collection = load_collection(str(folder))
    assert tested in collection.test.texts
    assert len(collection.train) == 40
    assert "copy" not in collection.train.ids


@pytest.mark.parametrize(
    ("name", "line", "rule"),
    [
        ("corpus.jsonl", "{", r"corpus.jsonl:65: not a line"),
        ("queries.jsonl", '{"_id": "x"}', r"queries.jsonl:65: not a line .*KeyError\('text'\)"),
        ("qrels/train.tsv", "q1 d1 1", r"train.tsv:82: not `query-id TAB corpus-id TAB score`: 'q1 d1 1'"),
        ("qrels/test.tsv", "q1\tnone\t1", r"test.tsv:34: 'none' is in neither queries.jsonl nor corpus.jsonl"),
        ("qrels/test.tsv", "none\td1\t1", r"test.tsv:34: 'none' is in neither"),
    ],
)
def test_wrong_lines_are_named(tmp_path, name, line, rule):
    folder = write_collection(tmp_path)
    with (folder / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=rule):
        load_collection(str(folder))


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match=r"neither .*icd10.* nor a folder with corpus.jsonl"):
        load_collection(str(tmp_path))
    folder = write_collection(tmp_path / "x")
    (folder / "qrels/train.tsv").unlink()
    with pytest.raises(DataError, match=r"qrels/train.tsv and qrels/test.tsv must both name relevant documents"):
        load_collection(str(folder))
    (folder / "queries.jsonl").unlink()
    with pytest.raises(DataError, match=r"needs queries.jsonl beside the other files"):
        load_collection(str(folder))
    (tmp_path / "icd10c-tabular.xml").write_text("<a>")
    with pytest.raises(AssetError, match="cannot be read"):
        load_collection(str(tmp_path))
