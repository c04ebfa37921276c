"""Pairs: where they come from, how they are parted, their tokens and batches, and questions of them."""

import json
import pickle
import random
import re

import numpy as np
import pytest
import torch
from language_support import END, byte_tokenizer
from torch.utils.data import DataLoader

from samplewise.loaders import collate_with_ids, with_ids
from samplewise.recipes import text_pairs
from samplewise.recipes.assets import AssetError
from samplewise.recipes.data import DataError
from samplewise.recipes.responses import pad_left
from samplewise.recipes.text_pairs import Pair, TokenizedPairs, choice_questions, load_pairs


def write_package(folder, modules=60):
    """Modules of two functions each; those of one module are alike."""
    for number in range(modules):
        path = folder / f"part{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(
                f'def {name}{number}(x):\n    """Return {name} number {number} of x."""\n'
                f"    return x.{name}({number})\n"
                for name in ("first", "second")
            )
        )
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = write_package(tmp_path / "package")
    monkeypatch.setattr(text_pairs, "DOCUMENTED", {"package": ()})
    monkeypatch.setattr(text_pairs, "resolve", lambda name, say: folder)
    monkeypatch.setattr(text_pairs, "origin", lambda folder: "a folder of the test's")
    return folder


def write_jsonl(path, entries):
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    return str(path)


def all_pairs(splits):
    return [*splits.train, *splits.validation, *splits.test]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_both_directions_have_the_same_functions_in_the_same_parts(package):
    to_doc, to_code = load_pairs("code_to_doc"), load_pairs("doc_to_code")
    assert len(all_pairs(to_doc)) == 120
    assert to_doc.source.endswith("from a folder of the test's")
    for part in ("train", "validation", "test"):
        there = {(pair.prompt.split("\n\n", 1)[1], pair.response) for pair in getattr(to_doc, part)}
        back = {(pair.response, pair.prompt.split("\n\n", 1)[1]) for pair in getattr(to_code, part)}
        assert there == back
        assert there
    assert Pair(
        "Write a Python function from this description.\n\nReturn first number 0 of x.",
        "def first0(x):\n    return x.first(0)",
    ) in all_pairs(to_code)


def test_no_module_is_in_two_parts_and_the_order_is_mixed(package):
    splits = load_pairs("code_to_doc")
    numbers = {
        part: [int(re.search(r"number (\d+)", pair.response)[1]) for pair in getattr(splits, part)]
        for part in ("train", "validation", "test")
    }
    assert sorted(number for part in numbers.values() for number in set(part)) == list(range(60))
    assert numbers["train"] != sorted(numbers["train"])


def test_parts_stay_when_others_come(package):
    before = load_pairs("code_to_doc")
    write_package(package, modules=90)
    after = load_pairs("code_to_doc")
    for part in ("train", "validation", "test"):
        kept = [pair for pair in getattr(after, part) if pair in all_pairs(before)]
        assert kept == getattr(before, part)
        assert len(getattr(after, part)) > len(kept)


def test_a_file_is_parted_by_its_prompts(tmp_path):
    entries = [{"prompt": f"ask {row % 500}", "response": f"answer {row}", "more": row} for row in range(1000)]
    splits = load_pairs(write_jsonl(tmp_path / "a.jsonl", entries))
    assert splits.source == f"the file {tmp_path / 'a.jsonl'}"
    assert sorted(pair.response for pair in all_pairs(splits)) == sorted(entry["response"] for entry in entries)
    prompts = [{pair.prompt for pair in part} for part in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, prompts)) == 500
    for part in prompts[1:]:
        assert len(part) == pytest.approx(50, abs=4 * (500 * 0.1 * 0.9) ** 0.5)
    assert load_pairs(write_jsonl(tmp_path / "b.jsonl", entries[::-1])).train == splits.train
    assert (splits.test[0].prompt, splits.test[-1].prompt) == ("ask 236", "ask 15")  # on every machine


def test_a_folder_keeps_its_parts_and_their_order(tmp_path):
    for part in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{part}.jsonl", [{"prompt": part, "response": str(row)} for row in range(3)])
    splits = load_pairs(str(tmp_path))
    assert splits.validation == [Pair("validation", str(row)) for row in range(3)]
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test.jsonl': no such file"):
        load_pairs(str(tmp_path))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", r"a.jsonl:3: not a line \{\"prompt\": ..., \"response\": ...\}: JSONDecodeError"),
        ('{"prompt": "a"}', r"a.jsonl:3: not a line .*KeyError\('response'\)"),
        ("[1]", r"a.jsonl:3: not a line .*TypeError"),
        ('{"prompt": "a", "response": 1}', r"a.jsonl:3: prompt and response must be texts that are not empty"),
        ('{"prompt": " ", "response": "a"}', r"a.jsonl:3: prompt and response must be texts that are not empty"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, rule):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", "response": "b"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rule):
        load_pairs(str(tmp_path / "a.jsonl"))


def test_what_is_no_data(tmp_path):
    with pytest.raises(DataError, match=r"data='docs': must be code_to_doc, doc_to_code, .*a .jsonl file, or a folder"):
        load_pairs("docs")
    with pytest.raises(DataError, match=r"none.jsonl': no such file"):
        load_pairs(str(tmp_path / "none.jsonl"))
    few = write_jsonl(tmp_path / "few.jsonl", [{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError, match=r"no pairs for .*give more pairs .*or a folder with train.jsonl"):
        load_pairs(few)


# --- tokens -----------------------------------------------------------------------------------------------------------

PAIRS = [Pair("What?", "This."), Pair("And then?", "That, and more."), Pair("Why", "So.")]


def texts(tokenizer, item):
    labels = item["labels"]
    return tokenizer.decode(item["input_ids"][labels == -100]), tokenizer.decode(labels[labels != -100])


def test_the_response_and_its_end_are_in_the_loss():
    tokenizer = byte_tokenizer()
    data = TokenizedPairs(PAIRS, tokenizer, 200)
    assert len(data) == 3
    assert texts(tokenizer, data[0]) == ("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", f"This.{END}")
    for item in data:
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        inside = item["labels"] != -100
        assert item["labels"][inside].equal(item["input_ids"][inside])
        assert inside.int().diff().sum() == inside[-1] == 1  # one stretch, at the end


@pytest.mark.parametrize(
    ("template", "prompt", "response"),
    [
        (None, "What?\n", f"This.{END}"),
        ("{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
         "{% if add_generation_prompt %}a: {% endif %}", "u: What?\na: ", f"This.{END}"),  # ends no turn itself
    ],
)  # fmt: skip
def test_other_templates(template, prompt, response):
    tokenizer = byte_tokenizer(template)
    assert texts(tokenizer, TokenizedPairs(PAIRS, tokenizer, 200)[0]) == (prompt, response)


def test_templates_and_tokenizers_that_will_not_do():
    odd = byte_tokenizer("{% if add_generation_prompt %}ask: {% endif %}{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="its chat template writes a prompt differently once it is answered"):
        TokenizedPairs(PAIRS, odd, 200)
    endless = byte_tokenizer(None)
    endless.eos_token = None
    with pytest.raises(ValueError, match="it has no token that ends a response; set eos_token"):
        TokenizedPairs(PAIRS, endless, 200)


def test_long_pairs_are_left_out_and_none_is_cut():
    tokenizer = byte_tokenizer()
    lengths = [len(item["labels"]) for item in TokenizedPairs(PAIRS, tokenizer, 200)]
    data = TokenizedPairs(PAIRS, tokenizer, lengths[0])
    assert (len(data), data.rows, data.dropped) == (2, [0, 2], 1)
    assert texts(tokenizer, data[1])[1] == f"So.{END}"
    with pytest.raises(ValueError, match=rf"max_length={min(lengths) - 1}\): the shortest of the 3 pairs has"):
        TokenizedPairs(PAIRS, tokenizer, min(lengths) - 1)
    assert len(TokenizedPairs([], tokenizer, 1)) == 0


def test_padding_goes_by_length_where_the_end_pads_too():
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = TokenizedPairs(PAIRS, tokenizer, 200)
    batch = pad_left([data[row] for row in range(3)])
    lengths = [len(data[row]["labels"]) for row in range(3)]
    width = max(lengths)
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        name: ((3, width), torch.int64) for name in ("input_ids", "labels", "attention_mask", "position_ids")
    }
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, length in enumerate(lengths):
        padding = width - length
        assert batch["labels"][row, -1] == tokenizer.eos_token_id  # the end itself is learnt
        assert (batch["labels"][row, :padding] == -100).all()
        assert not batch["attention_mask"][row, :padding].any()
        assert batch["labels"][row, padding:].equal(data[row]["labels"])
        assert batch["input_ids"][row, padding:].equal(data[row]["input_ids"])
        assert batch["position_ids"][row, padding:].equal(torch.arange(length))


def test_ids_come_through():
    data = TokenizedPairs(PAIRS, byte_tokenizer(), 200)
    collated = pad_left([with_ids(data)[2], with_ids(data)[0]])
    assert collated["sample_id"].tolist() == [2, 0]
    loader = DataLoader(with_ids(data), batch_size=2, collate_fn=collate_with_ids(pad_left))
    batches = list(loader)
    assert [batch["sample_id"].tolist() for batch in batches] == [[0, 1], [2]]
    assert batches[0]["labels"].equal(pad_left([data[0], data[1]])["labels"])
    assert "sample_id" not in pad_left([data[0]])
    assert pickle.loads(pickle.dumps(data))[0]["labels"].equal(data[0]["labels"])  # for workers


# --- questions --------------------------------------------------------------------------------------------------------

MANY = [Pair(f"ask {row}", "x" * (row // 2) + str(row)) for row in range(300)]


def test_questions():
    questions = choice_questions(MANY, count=200, seed=1)
    truth = {pair.prompt: pair.response for pair in MANY}
    assert len({question.prompt for question in questions}) == 200
    for question in questions:
        assert len(set(question.responses)) == 4
        assert question.responses[question.answer] == truth[question.prompt]
        lengths = [len(response) for response in question.responses]
        assert max(lengths) - min(lengths) <= 20
    counts = np.bincount([question.answer for question in questions], minlength=4)
    assert counts == pytest.approx(50, abs=4 * (200 * 0.25 * 0.75) ** 0.5)


def test_questions_go_by_the_seed_alone():
    python, state = random.getstate(), torch.get_rng_state()
    questions = choice_questions(MANY, count=20, choices=3, seed=1)
    assert choice_questions(MANY, count=20, choices=3, seed=1) == questions
    assert choice_questions(MANY, count=20, choices=3, seed=2) != questions
    assert choice_questions(MANY, count=5, choices=3, seed=1) == questions[:5]
    assert random.getstate() == python
    assert torch.get_rng_state().equal(state)


def test_another_right_response_is_no_wrong_one():
    pairs = [Pair("same", f"right {row}") for row in range(4)] + [Pair(f"ask {row}", f"wrong {row}") for row in "abc"]
    for question in choice_questions(pairs, count=7, seed=0):
        if question.prompt == "same":
            assert sum(response.startswith("right") for response in question.responses) == 1


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"count": 0}, r"count=0\): must be between 1 and the number of pairs, 3"),
        ({"count": 4}, r"count=4\): must be between 1 and the number of pairs, 3"),
        ({"count": 1, "choices": 1}, r"choices=1\): a question has at least 2 responses"),
        ({"count": 1, "choices": 4}, r"choices=4\): only 2 other responses for .*give more pairs or fewer choices"),
    ],
)
def test_questions_that_cannot_be_asked(options, rule):
    with pytest.raises(ValueError, match=rule):
        choice_questions(PAIRS, seed=0, **options)


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pairs_of_the_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path))
    try:
        splits = load_pairs("code_to_doc", say=lambda line: None)
    except AssetError as error:
        if not re.search(r"Could not|No matching|[Cc]onnection|[Rr]esol|timed out", str(error)):
            raise
        pytest.skip(f"no registry answers: {error}")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [3859, 622, 442]
    pairs = all_pairs(splits)
    assert len(set(pairs)) == len({pair.response for pair in pairs}) == len({pair.prompt for pair in pairs})
    assert all(name in splits.source for name in ("sympy==", "django==", "nltk==", "networkx=="))
    assert len(choice_questions(splits.test, count=400, seed=0)) == 400


def test_texts_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"prompt": "a", "response": "b"}\n{"prompt": "\xe9", "response": "b"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:2"):
        load_pairs(str(path))
    path.write_text('{"prompt": "\\ud800", "response": "b"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl:1"):
        load_pairs(str(path))


def test_parts_of_a_folder_that_share_a_prompt_are_refused(tmp_path):
    for part in ("train", "validation", "test"):
        (tmp_path / f"{part}.jsonl").write_text('{"prompt": "the same", "response": "b"}\n')
    with pytest.raises(DataError, match="in another part"):
        load_pairs(str(tmp_path))


def test_a_prompt_does_not_end_with_the_token_that_ends_texts():
    tokenizer = byte_tokenizer(None)
    plain = TokenizedPairs([Pair("a", "b")], tokenizer, 100)[0]["input_ids"].tolist()

    class Ending:
        """Ends every text, as tokenizers with `add_eos_token` do."""

        chat_template, eos_token, eos_token_id = None, tokenizer.eos_token, tokenizer.eos_token_id

        def __call__(self, texts, add_special_tokens=True):
            rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return {"input_ids": [[*row, self.eos_token_id] for row in rows] if add_special_tokens else rows}

    assert TokenizedPairs([Pair("a", "b")], Ending(), 100)[0]["input_ids"].tolist() == plain
