"""A small collection in the layout of BEIR, and a random encoder of two layers, for the tests of retrieval."""

import json
from pathlib import Path

import torch

ADJECTIVES = ("red", "green", "blue", "old", "new", "small", "large", "cold")
NOUNS = ("apple", "boat", "castle", "drum", "engine", "flower", "garden", "hammer")
PARTS = {"train": range(0, 40), "dev": range(40, 48), "test": range(48, 64)}


def write_collection(folder: Path) -> Path:
    """64 documents "red apple", ..., a query "apple that is red" for each; every eighth has a second relevant one."""
    pairs = [(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    documents = [
        {"_id": f"d{row}", "title": adjective, "text": f" {noun}\n"} for row, (adjective, noun) in enumerate(pairs)
    ]
    queries = [{"_id": f"q{row}", "text": f"{noun} that is {adjective}"} for row, (adjective, noun) in enumerate(pairs)]
    (folder / "qrels").mkdir(parents=True)
    for name, entries in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    for part, places in PARTS.items():
        lines = ["query-id\tcorpus-id\tscore"]
        for place in places:
            row = order[place]
            lines.append(f"q{row}\td{row}\t1")
            lines.append(f"q{row}\td{(row + 1) % 64}\t{int(row % 8 == 0)}")
        (folder / "qrels" / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_model(folder: Path) -> Path:
    """A BERT of 32 dimensions with random weights and a word-piece vocabulary of the collection's words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "that", "is", *ADJECTIVES, *NOUNS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32,
        )  # fmt: skip
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder
