"""What a model writes, compared with plain forwards of one text at a time and with ``generate``."""

import numpy as np
import pytest
import torch
from token_support import BOS, DATA, END, SPECIAL, decoded, llama, random_states, seq2seq_data, t5, teacher_forced

from samplewise.plugins.token_buffer import read_sample
from samplewise.plugins.token_rollouts import (
    Job,
    _answer,
    allowed,
    parallel_tokens,
    sequential_tokens,
    undisturbed,
    written_answers,
)

NONE = np.zeros(0, np.int64)
FULL = [one for row, one in enumerate(DATA) if row != 3]  # those that have responses


def jobs_of(data, beta, *, seq2seq=False, seed=0):
    rng = np.random.default_rng(seed)
    samples = [read_sample(one, "", seq2seq=seq2seq) for one in data]
    return [
        Job(s.tokens, s.places, s.targets, rng.random(len(s.targets)) < beta, rng.random(len(s.targets)))
        for s in samples
    ]


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def mixed(job, own, special=SPECIAL):
    """The text with a job's own tokens in it, place by place."""
    tokens = job.tokens.copy()
    for place, target, token, flag in zip(job.places, job.targets, own, job.replaced, strict=True):
        tokens[place] = token if flag and target not in special and token not in special else target
    return tokens


def one_by_one(model, job, special=SPECIAL):
    """A forward without a cache for each place, after the mixed context."""
    tokens, own = job.tokens.copy(), []
    for place, target, flag in zip(job.places, job.targets, job.replaced, strict=True):
        own.append(int(teacher_forced(model, tokens[: place + 1])[-1]))
        if flag and target not in special and own[-1] not in special:
            tokens[place] = own[-1]
    return np.array(own)


# --- parallel ---------------------------------------------------------------------------------------------------------


def test_own_tokens_vary():
    """What the other tests rest on: some are special, few are the same, and contexts matter."""
    model = llama()
    found = np.concatenate(parallel_tokens(model, jobs_of(FULL, 0), special=SPECIAL))
    assert 0.02 < np.isin(found, SPECIAL).mean() < 0.5
    assert len(set(found.tolist())) > len(found) / 3
    changed = np.concatenate(parallel_tokens(model, jobs_of(FULL, 1), special=SPECIAL, passes=2))
    assert (changed != found).mean() > 0.5


def test_one_pass_is_a_forward_of_the_references():
    model = llama()
    jobs = jobs_of(DATA, 0.5)  # what is replaced does not matter yet; one has no response
    found = parallel_tokens(model, jobs, special=SPECIAL)
    same(found, [teacher_forced(model, job.tokens)[job.places - 1] for job in jobs])
    same(parallel_tokens(model, jobs[3:4], special=SPECIAL), [NONE])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_each_pass_is_a_forward_of_what_the_one_before_makes(beta):
    model = llama()
    jobs = jobs_of(FULL, beta)
    own = [teacher_forced(model, job.tokens)[job.places - 1] for job in jobs]
    for passes in (2, 3):
        own = [teacher_forced(model, mixed(job, one))[job.places - 1] for job, one in zip(jobs, own, strict=True)]
        same(parallel_tokens(model, jobs, special=SPECIAL, passes=passes), own)


def test_as_many_passes_as_places_are_the_sequential_rollout():
    model = llama()
    jobs = jobs_of(FULL[:3], 0.7)
    passes = max(len(job.tokens) for job in jobs)
    same(parallel_tokens(model, jobs, special=SPECIAL, passes=passes), sequential_tokens(model, jobs, special=SPECIAL))


@pytest.mark.parametrize("rollout", [parallel_tokens, sequential_tokens])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_other_rows_of_a_batch_do_not_matter(rollout, temperature):
    model = llama()
    jobs = jobs_of(FULL, 0.5)
    given = {"special": SPECIAL, "temperature": temperature}
    whole = rollout(model, jobs, **given)
    same([rollout(model, [job], **given)[0] for job in jobs], whole)
    same(rollout(model, jobs[::-1], **given), whole[::-1])
    same(rollout(model, jobs[4:7], **given), whole[4:7])


def test_drawn_tokens_are_those_of_their_lots():
    model = llama()
    jobs = jobs_of(FULL, 0.0)
    hot = parallel_tokens(model, jobs, special=SPECIAL, temperature=1.5)
    for job, found in zip(jobs, hot, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(job.tokens)[None]).logits[0, job.places - 1]
        sums = np.cumsum(torch.softmax(logits.double() / 1.5, -1).numpy(), -1)
        np.testing.assert_array_equal(found, (sums <= job.lots[:, None]).sum(1))
    same(sequential_tokens(model, jobs, special=SPECIAL, temperature=1.5), hot)  # at beta 0 the context is the same


def test_models_that_cannot_leave_logits_out():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()
            self.config, self.device = self.inner.config, self.inner.device

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    jobs = jobs_of(DATA, 0.5)
    same(
        parallel_tokens(Plain(), jobs, special=SPECIAL, passes=2),
        parallel_tokens(llama(), jobs, special=SPECIAL, passes=2),
    )


@pytest.mark.parametrize(
    ("targets", "own", "special", "expected"),
    [
        ([1, 2, BOS, END], [3, BOS, 4, END], SPECIAL, [True, False, False, False]),
        ([1, BOS], [2, END], NONE, [True, True]),
        ([], [], SPECIAL, []),
    ],
)
def test_what_may_be_replaced(targets, own, special, expected):
    assert allowed(np.array(targets), np.array(own), special).tolist() == expected


# --- sequential -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_each_token_after_the_mixed_context(beta):
    model = llama()
    jobs = jobs_of(FULL, beta)  # with two turns in one of them
    found = sequential_tokens(model, jobs, special=SPECIAL)
    same(found, [one_by_one(model, job) for job in jobs])
    # and one forward of the mixed texts gives the very same tokens
    same(found, [teacher_forced(model, mixed(job, own))[job.places - 1] for job, own in zip(jobs, found, strict=True)])


def never_ends():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[END] = 0
    return model


@pytest.mark.parametrize("assistant", [None, 0, 1])
def test_all_own_tokens_are_what_generate_writes(assistant):
    model = never_ends()
    jobs = [job for job in jobs_of(FULL, 1.0) if len(job.places) == 1 or np.diff(job.places).max() == 1]
    options = {} if assistant is None else {"assistant_model": llama(assistant)}
    for job in jobs:
        count = len(job.targets)
        prompt = torch.from_numpy(job.tokens[: job.places[0]])[None]
        given = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)[0, prompt.shape[1] :]
        found = sequential_tokens(model, [job], special=NONE, options=options)
        same(found, [expected.numpy()])


def test_an_assistant_changes_nothing_at_any_beta():
    model = llama()
    for job in jobs_of(FULL[:6], 0.5):
        for temperature in (0.0, 0.8):
            plain, helped = (
                sequential_tokens(model, [job], special=SPECIAL, temperature=temperature, options=options)
                for options in (None, {"assistant_model": llama(1)})
            )
            same(helped, plain)


def test_the_models_own_settings_of_generate_do_not_bend_it():
    model = llama()
    jobs = jobs_of(FULL, 1.0)
    plain = sequential_tokens(model, jobs, special=SPECIAL)
    given = model.generation_config
    given.repetition_penalty, given.no_repeat_ngram_size, given.max_length = 5.0, 1, 3
    given.suppress_tokens = sorted({int(token) for row in plain for token in row})
    same(sequential_tokens(model, jobs, special=SPECIAL), plain)
    assert model.generation_config is given
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        sequential_tokens(model, jobs, special=SPECIAL)
    assert model.generation_config is given


# --- an encoder and a decoder -----------------------------------------------------------------------------------------


def test_passes_of_a_decoder():
    model = t5()
    data = seq2seq_data(DATA)
    jobs = jobs_of(data, 0.6, seq2seq=True)
    contexts = [job.targets for job in jobs]
    for passes in (1, 2):
        own = [
            decoded(model, job.tokens, context) if len(context) else NONE
            for job, context in zip(jobs, contexts, strict=True)
        ]
        same(parallel_tokens(model, jobs, special=SPECIAL, passes=passes), own)
        contexts = [
            np.where(job.replaced & allowed(job.targets, one, SPECIAL), one, job.targets)
            for job, one in zip(jobs, own, strict=True)
        ]
    assert any((context != job.targets).any() for context, job in zip(contexts, jobs, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.6, 1.0])
def test_places_of_a_decoder_one_by_one(beta):
    model = t5()
    jobs = jobs_of(seq2seq_data(FULL), beta, seq2seq=True)
    given = model.generation_config
    given.repetition_penalty = 7.0
    found = sequential_tokens(model, jobs, special=SPECIAL)
    assert model.generation_config is given
    for job, own in zip(jobs, found, strict=True):
        context = np.where(job.replaced & allowed(job.targets, own, SPECIAL), own, job.targets)
        np.testing.assert_array_equal(own, decoded(model, job.tokens, context))
    same([sequential_tokens(model, [job], special=SPECIAL)[0] for job in jobs], found)


def test_a_decoder_without_a_first_token():
    model = t5()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="T5ForConditionalGeneration: its configuration has no decoder_start_token_id"):
        parallel_tokens(model, jobs_of(seq2seq_data(FULL), 1, seq2seq=True), special=SPECIAL)


# --- the model afterwards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_generators_are_as_before(fails):
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()))
    model.train()
    model[1].eval()
    model[1][1].train()
    modes, states = [module.training for module in model.modules()], random_states()
    try:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            np.random.rand(3)  # noqa: NPY002
            __import__("random").random()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == modes
    assert random_states() == states
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("penalty", [None, 5.0])
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])  # without one, generate() takes the base model's settings
def test_a_model_of_peft(task, penalty):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, task_type=task)
    model = get_peft_model(llama(), config)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "lora_B" in name:
                values.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.train()
    jobs = jobs_of(FULL, 0.5)
    base = model.get_base_model()
    base.generation_config.repetition_penalty = penalty
    given = model.generation_config, base.generation_config
    with undisturbed(model):
        found = [rollout(model, jobs, special=SPECIAL) for rollout in (parallel_tokens, sequential_tokens)]
    assert model.training
    assert model.generation_config is given[0]
    assert base.generation_config is given[1]
    merged = model.eval().merge_and_unload()
    merged.generation_config.repetition_penalty = None
    for one, rollout in zip(found, (parallel_tokens, sequential_tokens), strict=True):
        same(one, rollout(merged, jobs, special=SPECIAL))
        differs = rollout(llama(), jobs, special=SPECIAL)
        assert any((a != b).any() for a, b in zip(one, differs, strict=True))


def test_answers_end_before_the_first_end():
    model = llama()
    prompts = [job.tokens[: job.places[0]] for job in jobs_of(FULL, 0)]
    found = written_answers(model, prompts, [], most=12, ends=SPECIAL, special=SPECIAL)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens, expected = prompt, []
        while len(expected) < 12:
            token = int(teacher_forced(model, [*tokens, 0])[-1])
            if token in SPECIAL:
                break
            expected.append(token)
            tokens = np.append(tokens, token)
        assert answer.tolist() == expected
    lengths = [len(answer) for answer in found]
    assert min(lengths) < 12 == max(lengths)


@pytest.mark.parametrize(
    ("tokens", "answer"),
    [
        ([1, 2, END, 3], [1, 2]),
        ([BOS, 1, 2, END], [1, 2]),  # as decoders begin whose first token is forced
        ([BOS, BOS, 1, BOS, 2], [1]),
        ([END, 1], []),
        ([BOS, END, 1], []),
        ([BOS], []),
        ([1, 2], [1, 2]),
        ([], []),
    ],
)
def test_answers_are_without_special_tokens(tokens, answer):
    assert _answer(np.array(tokens, np.int64), np.array([END]), SPECIAL).tolist() == answer


def test_generation_that_ends_early_is_no_row_of_tokens():
    with pytest.raises(ValueError, match="ended before the responses did"):
        sequential_tokens(llama(), jobs_of(FULL, 1), special=SPECIAL, options={"max_time": 1e-9})


def test_a_compiled_model_is_not_bent_by_its_settings():
    model = llama()
    model.generation_config.repetition_penalty = 9.0
    compiled = torch.compile(model, backend="eager")
    for found, expected in zip(
        sequential_tokens(compiled, jobs_of(FULL, 1), special=SPECIAL),
        sequential_tokens(llama(), jobs_of(FULL, 1), special=SPECIAL),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    assert model.generation_config.repetition_penalty == 9.0


def test_what_modules_do_when_modes_change_is_not_done():
    class Merges(torch.nn.Linear):
        def train(self, mode=True):
            self.weight.data += 1
            return super().train(mode)

    model = torch.nn.Sequential(Merges(2, 2))
    before = model[0].weight.clone()
    with undisturbed(model):
        assert not model[0].training
    assert model[0].training
    assert torch.equal(model[0].weight, before)
