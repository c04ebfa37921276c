"""`attach(trainer, sampler)` with trl's SFTTrainer, peft, and samples that are laid end to end."""

import copy

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from bits_support import tiny_llama
from huggingface_support import joined, prepare, weights
from language_support import byte_tokenizer

from samplewise.callbacks.huggingface import attach
from samplewise.loaders import Plan
from support import Everything, HardHalf, Returns

pytestmark = [
    pytest.mark.filterwarnings("error:attach"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TEXTS = [f"{'ab' * (1 + row % 5)} {row}" for row in range(12)]


@pytest.fixture(scope="module")
def parts():
    tokenizer = byte_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config), tokenizer


def sft(folder, parts, *, model=None, **settings):
    arguments = {
        "num_train_epochs": 2, "per_device_train_batch_size": 3, "learning_rate": 0.01, "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
        "gradient_checkpointing": False, "max_length": None, **settings,
    }  # fmt: skip
    return trl.SFTTrainer(
        copy.deepcopy(parts[0]) if model is None else model,
        trl.SFTConfig(str(folder), **arguments),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=parts[1],
    )


def noted_losses(sampler):
    """The losses that are recorded, by id."""
    found, observe = {}, sampler.observe

    def observed(ids, losses, **kwargs):
        found.update(zip(ids.tolist(), losses.tolist(), strict=True))
        return observe(ids, losses, **kwargs)

    sampler.observe = observed
    return found


def alone(trainer):
    """Each row's loss, by a model of its own."""
    losses = []
    with torch.no_grad():
        for row in trainer.train_dataset:
            ids, labels = (torch.tensor(row[key])[None] for key in ("input_ids", "labels"))
            given = {}
            if "seq_lengths" in row:
                given["position_ids"] = torch.cat([torch.arange(length) for length in row["seq_lengths"]])[None]
                labels[given["position_ids"] == 0] = -100
            losses.append(float(trainer.model(input_ids=ids, labels=labels, **given).loss))
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_free": True},
        {"padding_free": True, "pad_to_multiple_of": 64},
        {"packing": True, "max_length": 24},
        {"packing": True, "max_length": 24, "packing_strategy": "wrapped"},
    ],
    ids=["padded", "end_to_end", "filled_up", "packed", "wrapped"],
)
def test_losses_of_rows(tmp_path, parts, settings):
    """The sampler is made for the rows that the trainer has, packed or not; samples end to end have each its own."""
    trainer = sft(tmp_path, parts, learning_rate=0.0, num_train_epochs=1, logging_steps=3, **settings)
    rows = len(trainer.train_dataset)
    assert (rows < 12) == ("packing" in settings)
    sampler = Everything(rows)
    attach(trainer, sampler)
    found, expected = noted_losses(sampler), alone(trainer)
    trainer.train()
    assert [found[row] for row in range(rows)] == pytest.approx(expected, rel=1e-4)
    for row in trainer.state.log_history:
        assert ("entropy" in row) == ("loss" in row or "train_loss" in row)  # none of trl's metrics among ours


@pytest.mark.parametrize("settings", [{}, {"padding_free": True}, {"loss_type": "dft"}])
def test_weights(tmp_path, parts, settings):
    """Of the loss's own kind, dft's too: three epochs' logged losses are sums of parts that are weighted."""
    logged = []
    given = np.arange(12, dtype=np.float32)
    for weighted in (None, given, given + 1):
        trainer = sft(tmp_path, parts, learning_rate=0.0, num_train_epochs=1, **settings)
        attach(trainer, Returns(12, Plan(range(12), weighted), shuffle=False))
        trainer.train()
        logged.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    own, some, more = map(np.array, logged)
    assert (some > 0.5 * own).all()
    np.testing.assert_allclose(more - some, own, rtol=1e-3)


def test_without_weights_it_is_the_trainers_own_run(tmp_path, parts):
    ends = []
    for sampler in (None, Everything(12, shuffle=False)):
        strategy = "random" if sampler else "sequential"
        trainer = sft(tmp_path, parts, train_sampling_strategy=strategy, gradient_accumulation_steps=2)
        if sampler:
            attach(trainer, sampler)
        trainer.train()
        ends.append((weights(trainer), [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    assert ends[0] == ends[1]


def test_lora_and_resume(tmp_path, parts):
    def run(folder, resume=None):
        model = peft.get_peft_model(copy.deepcopy(parts[0]), peft.LoraConfig(target_modules=["q_proj"], r=2))
        with torch.no_grad():
            for number, weight in enumerate(p for p in model.parameters() if p.requires_grad):
                weight.copy_(torch.linspace(-0.1, 0.1, weight.numel()).view(weight.shape) * (number + 1))
        trainer, sampler = sft(folder, parts, model=model, save_strategy="steps", save_steps=1), HardHalf(12)
        attach(trainer, sampler)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer), sampler.ledger.records.numpy().tobytes()

    whole = run(tmp_path / "runs")
    assert run(tmp_path / "other", str(tmp_path / "runs" / "checkpoint-5")) == whole


def test_the_trainers_own_collate_function_that_flattens(tmp_path):
    tokens = [list(range(3, 6 + row)) for row in range(8)]
    data = [{"input_ids": row, "labels": row} for row in tokens]
    sampler = Everything(8)
    trainer, noted = prepare(
        tmp_path,
        sampler,
        model=tiny_llama(),
        data=data,
        given={"data_collator": transformers.DataCollatorWithFlattening()},
        learning_rate=0.0,
        num_train_epochs=1,
    )
    trainer.train()
    with torch.no_grad():
        own = [float(trainer.model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss) for row in tokens]
    found = dict(zip(joined(noted.ids), joined(noted.losses), strict=True))
    assert [found[row] for row in range(8)] == pytest.approx(own, rel=1e-4)


def test_a_sampler_made_before_packing_is_refused(tmp_path, parts):
    trainer = sft(tmp_path, parts, packing=True, max_length=24)
    with pytest.raises(ValueError, match=r"make the sampler with size=len\(trainer.train_dataset\)"):
        attach(trainer, Everything(12))
