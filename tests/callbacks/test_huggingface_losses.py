"""`attach(trainer, sampler)`: each sample's own loss, and its weight in what is backpropagated."""

import numpy as np
import pytest
import torch
import transformers
from bits_support import tiny_llama, token_ids
from huggingface_support import Told, items, joined, prepare, told_rows, weights
from torch.nn import functional as F

from samplewise.loaders import Plan
from support import Everything, Returns

pytestmark = [pytest.mark.filterwarnings("error:attach")]
ROWS, LENGTH = 8, 9


def small(kind, name, **more):
    """A model of one layer without dropout."""
    sizes = {
        "Bert": {
            "vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        "T5": {
            "vocab_size": 97, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
            "dropout_rate": 0.0, "decoder_start_token_id": 0,
        },
        "Llama": {
            "vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "pad_token_id": 0,
        },
    }[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return getattr(transformers, f"{kind}{name}")(config)


def labels_of(what):
    """Labels of 8 rows; where tokens have some, the first ``i % 4`` do not count."""
    tokens = token_ids(ROWS, LENGTH, seed=1)
    if what == "spans":
        return {"start_positions": torch.arange(ROWS), "end_positions": torch.arange(ROWS) % 5}
    if what == "classes":
        labels = tokens[:, 0] % 3
    elif what == "values":
        labels = tokens[:, :3].float() / 97
    elif what == "value":
        labels = tokens[:, 0].float() / 97
    elif what == "choices":
        labels = (tokens[:, :3] % 2).float()
    else:
        labels = tokens % 5 if what == "tags" else tokens
        for row in range(ROWS):
            labels[row, : row % 4] = -100
    return {"labels": labels}


def data_of(what):
    columns = {"input_ids": token_ids(ROWS, LENGTH), **labels_of(what)}
    return [{key: column[row] for key, column in columns.items()} for row in range(ROWS)]


HEADS = {
    "causal": ("Llama", "ForCausalLM", "tokens", {}),
    "causal_old": ("Bert", "LMHeadModel", "tokens", {"is_decoder": True}),
    "masked": ("Bert", "ForMaskedLM", "tokens", {}),
    "seq2seq": ("T5", "ForConditionalGeneration", "tokens", {}),
    "tags": ("Bert", "ForTokenClassification", "tags", {"num_labels": 5}),
    "tags_new": ("Llama", "ForTokenClassification", "tags", {"num_labels": 5, "classifier_dropout": 0.0}),
    "classes": ("Bert", "ForSequenceClassification", "classes", {"num_labels": 3}),
    "classes_new": ("Llama", "ForSequenceClassification", "classes", {"num_labels": 3}),
    "value": ("Bert", "ForSequenceClassification", "value", {"num_labels": 1}),
    "values": ("Llama", "ForSequenceClassification", "values", {"num_labels": 3, "problem_type": "regression"}),
    "choices": ("Llama", "ForSequenceClassification", "choices", {"num_labels": 3}),
    "spans": ("Bert", "ForQuestionAnswering", "spans", {}),
    "spans_new": ("Llama", "ForQuestionAnswering", "spans", {}),
}


def focal(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """A loss function of the user's own, in the model."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    losses = F.cross_entropy(logits.float().reshape(-1, vocab_size), labels, reduction="none", ignore_index=-100)
    total = (losses * (1 - (-losses).exp()) ** 2).sum()
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def squared(outputs, labels, num_items_in_batch=None):
    """A `compute_loss_func`: squared errors of probabilities, over the tokens of a step."""
    labels = labels[:, 1:].reshape(-1)
    chosen = outputs.logits[:, :-1].float().softmax(-1).flatten(0, 1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    total = ((1 - chosen).square() * (labels != -100)).sum()
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def case(name):
    """A model, its data, settings and arguments of the trainer, and what gives one row's loss."""
    if name in HEADS:
        kind, head, what, more = HEADS[name]
        return small(kind, head, **more), data_of(what), {}, {}
    if name == "focal":
        model = small("Llama", "ForCausalLM")
        model.loss_function = focal
        return model, data_of("tokens"), {}, {}
    if name == "function":
        return small("Llama", "ForCausalLM"), data_of("tokens"), {}, {"compute_loss_func": squared}
    kind, head, what, more = HEADS["causal" if name == "smooth" else "classes"]
    return small(kind, head, **more), data_of(what), {"label_smoothing_factor": 0.2}, {}


def alone(trainer, data):
    """Each row's loss as the Trainer computes it for a batch of that row, and how many labels count."""
    losses, counts = [], []
    trainer.current_gradient_accumulation_steps = 1
    for row in data:
        batch = {key: value[None] for key, value in row.items()}
        shift = trainer._loss_shifts_labels or "LMHead" in type(trainer.model).__name__
        labels = batch.get("labels", torch.zeros(1, 1, dtype=torch.int64))
        whole = labels.dim() == 2 and not labels.is_floating_point()
        counts.append(int(((labels[:, 1:] if shift else labels) != -100).sum()) if whole else 1)
        items = torch.tensor(counts[-1]) if trainer.compute_loss_func is not None else None
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)))
    return np.array(losses), np.array(counts)


def steps_of(trainer):
    """Have the Trainer write down what each batch adds to the logged loss."""
    found, step = [], trainer.training_step

    def training_step(*args, **kwargs):
        found.append(float(step(*args, **kwargs)))
        return torch.tensor(found[-1])

    trainer.training_step = training_step
    return found


@pytest.mark.parametrize("name", [*HEADS, "focal", "function", "smooth", "smooth_classes"])
def test_losses_of_samples_and_their_weights(tmp_path, name):
    """With weights, a batch adds its own loss times what the weights do to the sum of its samples' losses."""
    own_steps, batches = None, [slice(begin, begin + 2) for begin in range(0, ROWS, 2)]
    given = np.array([1, 1, 0.5, 2, 0, 3, 1, 0.25], dtype=np.float32)
    thorough = name in ("causal", "seq2seq", "function")
    for weighted in (None, np.ones(ROWS, np.float32), given) if thorough else (None, given):
        model, data, settings, options = case(name)
        sampler = Returns(ROWS, Plan(range(ROWS), weighted), shuffle=False)
        settings = {"learning_rate": 0.0, "num_train_epochs": 1, "max_grad_norm": 0, **settings}
        trainer, noted = prepare(tmp_path, sampler, model=model, data=data, given=options, **settings)
        losses, counts = alone(trainer, data)
        found = steps_of(trainer)
        trainer.train()
        assert joined(noted.losses) == pytest.approx(losses.tolist(), rel=1e-4)
        if own_steps is None:
            own_steps = found
            if not thorough:
                continue
            plain, _ = prepare(
                tmp_path,
                model=case(name)[0],
                data=data,
                given=options,
                train_sampling_strategy="sequential",
                **settings,
            )
            own = steps_of(plain)
            plain.train()
            assert own == found
        elif weighted is given:
            factors = [(given * losses * counts)[one].sum() / (losses * counts)[one].sum() for one in batches]
            assert found == pytest.approx([a * b for a, b in zip(own_steps, factors, strict=True)], rel=1e-4)
        else:
            assert found == own_steps
        assert vars(model).get("_loss_function") is (focal if name == "focal" else None)
        again, _ = alone(trainer, data)
        assert again.tolist() == losses.tolist()  # the model and its loss function are as they were


def test_gradients_with_weights(tmp_path):
    """sum_i w_i (sum of i's token losses) / tokens of the step."""
    given = np.linspace(0, 2, ROWS).astype(np.float32)
    sampler = Returns(ROWS, Plan(range(ROWS), given), shuffle=False)
    model, data = small("Llama", "ForCausalLM"), data_of("tokens")
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, "max_grad_norm": 0, "gradient_accumulation_steps": 4}
    trainer, _ = prepare(tmp_path, sampler, model=model, data=data, **settings)
    gradients = []

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            gradients.append([p.grad.clone() for p in model.parameters()])

    trainer.add_callback(Gradients())
    trainer.train()
    model.zero_grad()
    ids, labels = (torch.stack([row[key] for row in data]) for key in ("input_ids", "labels"))
    logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
    sums = F.cross_entropy(logits, labels[:, 1:], reduction="none", ignore_index=-100).sum(1)
    ((torch.from_numpy(given) * sums).sum() / (labels[:, 1:] != -100).sum()).backward()
    for got, parameter in zip(gradients[0], model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-7)


def test_a_function_of_the_users(tmp_path):
    """Weights apply to the mean of its losses, over the batches of a step too."""
    given = np.arange(ROWS, dtype=np.float32)
    found = {}
    for weighted in (None, given):
        sampler = Returns(ROWS, Plan(range(ROWS), weighted), shuffle=False)

        def losses(outputs, inputs):
            return (outputs["logits"][:, 0] - inputs["labels"]).square()

        trainer, noted = prepare(
            tmp_path, sampler, model=Told(), data=told_rows(ROWS), losses=losses, num_train_epochs=1
        )
        found[weighted is None] = steps_of(trainer)
        trainer.train()
        squares = ((np.arange(ROWS) + 1) / 8) ** 2
        assert joined(noted.losses) == squares.tolist()
    assert found[True] == pytest.approx((squares.reshape(-1, 2).mean(1) / 2).tolist())
    assert found[False] == pytest.approx(((given * squares).reshape(-1, 2).mean(1) / 2).tolist())


# --- what is refused --------------------------------------------------------------------------------------------------


class NoLogits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def forward(self, input_ids, labels):
        return {"loss": self.model(input_ids=input_ids, labels=labels).loss}


class Odd(NoLogits):
    def forward(self, input_ids, labels):
        outputs = self.model(input_ids=input_ids, labels=labels)
        return {"loss": outputs.loss, "logits": outputs.logits[:, 0, :5]}


class Penalised(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss + 0.1 * sum(p.square().sum() for p in model.parameters())


class Compares(transformers.Trainer):
    """Asks the model something else before and after."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        others = inputs["input_ids"].flip(0)
        with torch.no_grad():
            model(input_ids=others)
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            model(input_ids=others)
        return loss


def test_the_outputs_that_are_trained_on(tmp_path):
    found = []
    for kind in (transformers.Trainer, Compares):
        trainer, noted = prepare(tmp_path, Everything(22), kind=kind, num_train_epochs=1)
        trainer.train()
        found.append(noted.losses)
    assert found[0] == found[1]


class NoModel(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.model.lm_head.weight.sum()


def scalar(outputs, inputs):
    return outputs.loss


def test_losses_that_cannot_be_told(tmp_path):
    lists = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in items()]
    flat = {"given": {"data_collator": transformers.DataCollatorWithFlattening()}, "data": lists}
    for settings, error, message in (
        ({"model": NoLogits()}, RuntimeError, r"gave no logits \(loss\).*use_liger_kernel=False"),
        ({"model": Odd()}, RuntimeError, "no loss of single samples is known .* losses=function"),
        ({"kind": Penalised}, RuntimeError, "the samples' losses, of mean .*, do not make it up"),
        ({"kind": NoModel}, RuntimeError, "did not call the model"),
        ({"losses": scalar}, ValueError, r"attach\(losses=...\): losses must give one loss a sample.*\(2,\)"),
        ({**flat, "label_smoothing_factor": 0.1}, RuntimeError, "2 samples are laid end to end in one row"),
        ({**flat, "losses": scalar}, ValueError, "must give one loss a sample"),
    ):
        data = settings.pop("data", None) or [{k: v for k, v in row.items() if k != "unused"} for row in items()]
        trainer, _ = prepare(tmp_path, Everything(len(data)), data=data, **settings)
        with pytest.raises(error, match=message):
            trainer.train()


def test_a_term_of_the_users_own_with_a_function(tmp_path):
    """What is backpropagated stays the Trainer's own."""
    ends = []
    for sampler in (None, Everything(22, shuffle=False)):
        strategy = "random" if sampler else "sequential"
        trainer, _ = prepare(
            tmp_path,
            sampler,
            kind=Penalised,
            losses=lambda outputs, inputs: outputs.logits[:, 0, 0],
            train_sampling_strategy=strategy,
            num_train_epochs=1,
        )
        trainer.train()
        ends.append(weights(trainer))
    assert ends[0] == ends[1]
