"""Prompts and responses for language models, from the docstrings of Python packages or from files of the user's.

`code_to_doc` asks for the first sentence of a short function's docstring, `doc_to_code` for the function, and
`signature_to_doc` for the docstring below a function's first line, as an editor would; functions and methods come from
pinned packages (`DOCUMENTED` in `samplewise.recipes.assets`), which are read, never run. A file of one's own holds a
line `{"prompt": ..., "response": ...}` for each pair; a folder holds `train.jsonl`, `validation.jsonl` and
`test.jsonl`. What is tokenised there, in batches of `samplewise.recipes.responses.pad_left`:

    pairs = load_pairs("code_to_doc")
    data = TokenizedPairs(pairs.train, tokenizer, max_length=256)
    loader = DataLoader(with_ids(data), batch_size=8, sampler=sampler, collate_fn=collate_with_ids(pad_left))
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from samplewise.loaders.seeding import generator
from samplewise.recipes.assets import DOCUMENTED, Say, origin, resolve
from samplewise.recipes.corpus import place
from samplewise.recipes.data import DataError
from samplewise.recipes.docstrings import Documented, documented, unique

KINDS = ("code_to_doc", "doc_to_code", "signature_to_doc")
PARTS = ("train", "validation", "test")
TEST, VALIDATION = 0.1, 0.1
"""Shares of the modules (of the prompts, in a file of the user's) that are not trained on."""

IGNORED = -100
"""The label of what is not in the loss."""

TO_DOC = "Describe this Python function in one sentence.\n\n"
TO_CODE = "Write a Python function from this description.\n\n"


@dataclass(frozen=True)
class Pair:
    """What the model is asked, and what it should answer."""

    prompt: str
    response: str


@dataclass(frozen=True)
class PairSplits:
    """The pairs of each part.

    Attributes:
        train, validation, test: no two parts share a prompt, nor, of packages, a module.
        source: where they came from, in words.
    """

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    source: str


@dataclass(frozen=True)
class Question:
    """A prompt with several responses, of which the one at `answer` is the true one."""

    prompt: str
    responses: tuple[str, ...]
    answer: int


def load_pairs(data: str, *, say: Say = print) -> PairSplits:
    """Find, read and part the pairs; the same ones in the same order every time.

    Args:
        data: "code_to_doc", "doc_to_code", "signature_to_doc", a `.jsonl` file, or a folder of three.
        say: gets a line on each source tried.

    Raises:
        AssetError: a package could not be had; the message lists what was tried.
        DataError: a file that is not understood, or a part without pairs.
    """
    if data in KINDS:
        folders = [resolve(f"{package}-source", say=say) for package in DOCUMENTED]
        found = unique(
            pair for name, folder in zip(DOCUMENTED, folders, strict=True) for pair in documented(folder, name)
        )
        keyed, prompts = [], set[str]()
        for entry in found:
            pair = _pair(entry, data)
            if pair.prompt not in prompts:  # many functions have the same first line; the first of them is taken
                prompts.add(pair.prompt)
                keyed.append((entry.module, pair))
        source = "first sentences of docstrings and their functions, from " + ", ".join(map(origin, folders))
        return _checked(data, PairSplits(**_parted(keyed), source=source))
    path = Path(data)
    if path.is_dir():
        parts = {part: list(_jsonl(path / f"{part}.jsonl")) for part in PARTS}
        if common := {pair.prompt for pair in parts["train"]} & {pair.prompt for p in PARTS[1:] for pair in parts[p]}:
            raise DataError(
                f"data={data!r}: {len(common)} prompts of train.jsonl are in another part too, such as {min(common)!r}"
            )
        return _checked(data, PairSplits(**parts, source=f"the folder {data}"))
    if path.suffix == ".jsonl":
        keyed = [(pair.prompt, pair) for pair in _jsonl(path)]
        return _checked(data, PairSplits(**_parted(keyed), source=f"the file {data}"))
    raise DataError(f"data={data!r}: must be {', '.join(KINDS)}, a .jsonl file, or a folder with {_names()}")


def _checked(data: str, splits: PairSplits) -> PairSplits:
    empty = [part for part in PARTS if not getattr(splits, part)]
    if empty:
        raise DataError(
            f"data={data!r}: no pairs for {', '.join(empty)}; give more pairs (a single file is parted by a hash of "
            f"the prompt, about 80/10/10), or a folder with {_names()}"
        )
    return splits


def _parted(keyed: Iterable[tuple[str, Pair]]) -> dict[str, list[Pair]]:
    """By a hash of the key; shuffled by a hash of the pair, so that the order stays when pairs are added."""
    parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for key, pair in keyed:
        where = place(key)
        parts["test" if where < TEST else "validation" if where < TEST + VALIDATION else "train"].append(pair)
    return {
        part: sorted(pairs, key=lambda pair: place(f"{pair.prompt}\n{pair.response}")) for part, pairs in parts.items()
    }


def _names() -> str:
    return ", ".join(f"{part}.jsonl" for part in PARTS)


def _pair(entry: Documented, kind: str) -> Pair:
    if kind == "code_to_doc":
        return Pair(TO_DOC + entry.code, entry.sentence)
    if kind == "signature_to_doc":
        return Pair(f'{entry.signature}\n    """', entry.sentence)
    return Pair(TO_CODE + entry.sentence, entry.code)


# --- files of the user's ----------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> Iterator[Pair]:
    if not path.is_file():
        raise DataError(f"data={str(path)!r}: no such file")
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                line.encode()
                entry = json.loads(line)
                json.dumps(entry, ensure_ascii=False).encode()
                prompt, response = entry["prompt"], entry["response"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f'{path}:{number}: not a line {{"prompt": ..., "response": ...}}: {error!r}') from error
            if not (isinstance(prompt, str) and isinstance(response, str) and prompt.strip() and response.strip()):
                raise DataError(f"{path}:{number}: prompt and response must be texts that are not empty")
            yield Pair(prompt, response)


# --- tokens -----------------------------------------------------------------------------------------------------------


class TokenizedPairs(Dataset[dict[str, Tensor]]):
    """Pairs as the tokenizer's chat template writes them, or, without one, as prompt, newline, response.

    An item is `{"input_ids": int64 (T,), "labels": int64 (T,)}`, with T <= `max_length`. Labels are the tokens of the
    response and the one that ends it, and -100 on the prompt; they are not shifted. The prompt's tokens are those that
    the model is given when it is to answer.

    Args:
        pairs: what to tokenise.
        tokenizer: of transformers.
        max_length: longer pairs are left out, in tokens; none is cut.

    Attributes:
        rows: for each item the place of its pair in `pairs`.
        dropped: the number of those left out.

    Raises:
        ValueError: no pair is short enough, or the tokenizer has no end-of-text token where one is needed.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Any, max_length: int):
        written = [_written(pair, tokenizer) for pair in pairs]
        prompts = _tokens(tokenizer, [prompt for prompt, _ in written], not tokenizer.chat_template)
        answers = _tokens(tokenizer, [answer for _, answer in written], False)
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        kept = [row for row, length in enumerate(lengths) if length <= max_length]
        if pairs and not kept:
            raise ValueError(
                f"TokenizedPairs(max_length={max_length}): the shortest of the {len(pairs)} pairs has {min(lengths)} "
                f"tokens; pairs are never cut, so give at least that"
            )
        self.rows, self.dropped = kept, len(pairs) - len(kept)
        self._items = [_item(prompts[row], answers[row]) for row in kept]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The tokens and labels of a pair."""
        return dict(self._items[index])


def _written(pair: Pair, tokenizer: Any) -> tuple[str, str]:
    """The text up to the response, and the response with what ends it."""
    if not tokenizer.chat_template:
        return f"{pair.prompt}\n", pair.response + _end(tokenizer)
    asked = [{"role": "user", "content": pair.prompt}]
    answered = [*asked, {"role": "assistant", "content": pair.response}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(answered, tokenize=False)
    if not text.startswith(prompt):
        raise ValueError(
            f"TokenizedPairs(tokenizer={type(tokenizer).__name__}): its chat template writes a prompt differently once "
            f"it is answered ({text[:80]!r}); set `tokenizer.chat_template = None`, or one that does not"
        )
    answer = text[len(prompt) :].rstrip()  # some templates write a line's end after the token that ends the turn
    return prompt, answer + _end(tokenizer) if answer.endswith(pair.response.rstrip()) else answer


def _end(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise ValueError(
            f"TokenizedPairs(tokenizer={type(tokenizer).__name__}): it has no token that ends a response; set eos_token"
        )
    return str(tokenizer.eos_token)


def _tokens(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
    end = tokenizer.eos_token_id
    return [row[:-1] if special and row[1:] and row[-1] == end else row for row in found]  # a prompt does not end


def _item(prompt: list[int], answer: list[int]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor(prompt + answer, dtype=torch.int64),
        "labels": torch.tensor([IGNORED] * len(prompt) + answer, dtype=torch.int64),
    }


# --- questions --------------------------------------------------------------------------------------------------------


def choice_questions(pairs: Sequence[Pair], *, count: int, choices: int = 4, seed: int) -> list[Question]:
    """Multiple-choice questions: which of several responses belongs to the prompt?

    The wrong ones are true responses of other prompts, drawn from the `8 * choices` nearest in length (characters).

    Args:
        pairs: of one part; none is asked twice.
        count: the number of questions; at most one for each pair.
        choices: responses of each question, all different.
        seed: of the draws; the global generators are left alone.

    Raises:
        ValueError: too few pairs, or too few different responses.
    """
    if not 1 <= count <= len(pairs):
        raise ValueError(f"choice_questions(count={count}): must be between 1 and the number of pairs, {len(pairs)}")
    if choices < 2:
        raise ValueError(f"choice_questions(choices={choices}): a question has at least 2 responses")
    draws = generator(seed, "questions")
    right: dict[str, set[str]] = {}
    for pair in pairs:
        right.setdefault(pair.prompt, set()).add(pair.response)
    responses = sorted({pair.response for pair in pairs}, key=lambda response: (len(response), response))
    places = {response: number for number, response in enumerate(responses)}
    questions = []
    for row in draws.permutation(len(pairs))[:count].tolist():
        pair = pairs[row]
        here, reach = places[pair.response], 4 * choices
        first = max(0, min(here - reach, len(responses) - 2 * reach - 1))
        near = [other for other in responses[first : first + 2 * reach + 1] if other not in right[pair.prompt]]
        if len(near) < choices - 1:
            raise ValueError(
                f"choice_questions(choices={choices}): only {len(near)} other responses for {pair.prompt[:60]!r}; give "
                f"more pairs or fewer choices"
            )
        drawn = [near[number] for number in draws.choice(len(near), choices - 1, replace=False).tolist()]
        answer = int(draws.integers(choices))
        drawn.insert(answer, pair.response)
        questions.append(Question(pair.prompt, tuple(drawn), answer))
    return questions
